"""Memory: how much is free, whether a request fits, and what each phase of a run took at its peak."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import ResourceError

_CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
_EXHAUSTED = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that can still be allocated on `device` (the CPU if None); None where that cannot be found out."""
    if device is not None and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device is not None and device.type != "cpu":
        return None
    found = [size for size in (_system_memory(), _container_memory()) if size is not None]
    return min(found, default=None)


def _system_memory() -> int | None:
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _container_memory() -> int | None:
    """What the limit of a container leaves; None without a limit."""
    for limit_file, usage_file in _CGROUP_FILES:
        with suppress(OSError, ValueError):  # the limit may read "max"
            return max(int(limit_file.read_text()) - int(usage_file.read_text()), 0)
    return None


def require_memory(needed: float, purpose: str, advice: str, device: torch.device | None = None) -> None:
    """Refuse a request that cannot fit.

    Args:
        needed: bytes.
        purpose: what they are for; begins the sentence.
        advice: what to do instead; ends it.
        device: where; the CPU if None.

    Raises:
        ResourceError: less than `needed` is available.
    """
    available = available_memory(device)
    if available is not None and needed > available:
        where = "" if device is None or device.type == "cpu" else f" on {device}"
        raise ResourceError(
            f"{purpose} needs about {gigabytes(needed)} of memory, {gigabytes(available)} are available{where}: "
            f"{advice}."
        )


def require_disk(folder: Path, needed: float, purpose: str) -> None:
    """Refuse a result for which `folder` certainly has no room (`needed` bytes).

    Raises:
        ResourceError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{purpose} needs at least {gigabytes(needed)} on disk, {folder} has {gigabytes(free)} left: "
            "make room or choose another folder."
        )


def gigabytes(size: float) -> str:
    """Bytes for a person: "3.2 GB", "45 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 0.95e9 else f"{size / 1e6:.0f} MB"


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of a run took."""

    name: str
    """Name of the phase."""
    seconds: float
    """Wall-clock time."""
    peak_bytes: int | None
    """Most memory the process held (on a GPU: that torch held there) during it; None where unknown."""


@dataclass(slots=True)
class Meter:
    """Times phases and measures their peak memory."""

    device: torch.device
    """Device that the networks run on."""
    phases: list[Phase] = field(default_factory=list)
    """The phases so far."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to phase `name`."""
        reset_peak(self.device)
        start = time.perf_counter()
        yield
        self.phases.append(Phase(name, time.perf_counter() - start, peak_memory(self.device)))


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement; elsewhere than on Linux and CUDA the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes held at most since `reset_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return _peak_of_process()


def _peak_of_process() -> int | None:
    if os.name != "posix":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def one_sentence_when_exhausted(advice: str) -> Iterator[None]:
    """Inside, an allocation that fails becomes a ResourceError that ends in `advice`; estimates can be too low."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_exhaustion(error):
            raise
        raise ResourceError(f"The memory is exhausted: {advice}.") from error


def is_exhaustion(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted."""
    # torch's CPU allocator and its CUDA one have a RuntimeError each; only their text is common to all versions.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_EXHAUSTED.search(str(error))))
