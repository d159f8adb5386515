"""Prepared batches that are used more than once: in memory, and on disk if a folder is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from seesr_core.errors import WeightsError
from seesr_core.formats.metadata import save_safetensors
from seesr_core.formats.tensorfile import is_undamaged, load_tensors, read_header


@dataclass(slots=True)
class PreparedPair:
    """Crops before and after degradation, as rounded to 8 bits; what stage 1 looks at."""

    lr: Tensor
    """Degraded, enlarged to the size of the clean crops (B, 3, H, W), uint8."""
    hr: Tensor
    """Sharpened clean crops (B, 3, H, W), uint8."""


@dataclass(slots=True)
class Prepared:
    """What the frozen networks and the degradation make of a batch of photos, in compact types."""

    photos: Tensor
    """Number of the photo that each crop is from (B,)."""
    target: Tensor
    """Sharpened HR (B, 3, H, W), uint8."""
    condition: Tensor
    """Upsampled LR (B, 3, H, W), uint8, as the published pairs are stored."""
    latents: Tensor
    """z₀ of the target, scaled (B, 4, H/8, W/8)."""
    soft_prompt: Tensor
    """DAPE's tokens (B, L, D)."""


Kept = TypeVar("Kept")


class Pool(Generic[Kept]):
    """The batches numbered 0 … size − 1; batch n serves every step s with s mod size = n.

    Args:
        size: number of batches; 0 keeps nothing.
        key: tells what the batches were made of; files of another key are made anew.
        folder: where to keep them between runs.
        kind: what a batch is: a dataclass of tensors.
    """

    def __init__(self, size: int, key: str, folder: Path | None = None, *, kind: type[Kept]) -> None:
        self.size, self.key, self.folder = size, key, folder
        self.kind: Any = kind
        self.held: dict[int, Kept] = {}

    def get(self, step: int, make: Callable[[int], Kept]) -> Kept:
        """The batch of a step, made by `make(number)` if it is not there yet."""
        if not self.size:
            return make(step)
        number = step % self.size
        if number not in self.held:
            self.held[number] = self._read(number) or self._write(number, make(number))
        return self.held[number]

    def _path(self, number: int) -> Path | None:
        return self.folder / f"{number:05d}.safetensors" if self.folder else None

    def _read(self, number: int) -> Kept | None:
        path = self._path(number)
        if path is None or not path.exists():
            return None
        try:
            header = read_header(path)
            if header.metadata.get("key") != self.key or is_undamaged(header) is False:
                return None
            tensors = load_tensors(path)
            batch: Kept = self.kind(**{field.name: tensors[field.name] for field in fields(self.kind)})
            return batch
        except (WeightsError, OSError, KeyError):
            return None

    def _write(self, number: int, batch: Kept) -> Kept:
        path = self._path(number)
        if path is not None:
            tensors = {field.name: getattr(batch, field.name).contiguous() for field in fields(self.kind)}
            save_safetensors(path, tensors, {"key": self.key}, finite=False)
        return batch
