"""What the sections share: the device, and sizes that suit it or a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from seesr_core.runtime.devices import choose_device
from seesr_core.runtime.memory import peak_memory, reset_peak


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Where and how large."""

    small: bool = False
    """Whether it is a dry run: tiny networks on the CPU."""

    @property
    def device(self) -> torch.device:
        """The card; the CPU in a dry run, or where there is no card."""
        return torch.device("cpu") if self.small else choose_device()

    @property
    def net(self) -> str:
        """Networks of the published sizes, or tiny ones."""
        return "small" if self.small else "full"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Precisions that are tried."""
        return ("fp32", "bf16") if self.small else ("fp32", "fp16", "bf16")

    @property
    def half(self) -> str:
        """The precision that the card is used in."""
        return "bf16" if self.small else "fp16"

    def side(self, pixels: int) -> int:
        """A side of a picture; a sixteenth of it in a dry run."""
        return max(pixels // 16, 64) if self.small else pixels

    def seconds(self, work: Callable[[], object], *, times: int = 3) -> float:
        """Seconds of `work` by the wall, the least of several, the device waited for; once more before, to warm up."""
        self.wait(work)
        return min(self.wait(work) for _ in range(1 if self.small else times))

    def wait(self, work: Callable[[], object]) -> float:
        """Seconds of `work`, with the device waited for at both ends."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, work: Callable[[], object]) -> int:
        """Bytes held at most while `work` runs."""
        reset_peak(self.device)
        work()
        return peak_memory(self.device) or 0
