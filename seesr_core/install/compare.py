"""Is the frozen part of SeeSR's U-Net really the base model? Compared weight by weight before it is dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..formats import sources
from ..formats.detect import Kind, require
from ..formats.ldm import unet_to_ldm
from ..formats.portions import load_portion, portions
from ..formats.sources import Source
from ..formats.tensorfile import Header, read_header

RCA = ".image_attentions."
UNET_PREFIX = "model.diffusion_model."
_NAMES = tuple(
    f"diffusion_pytorch_model{middle}" for middle in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
)
_ROUNDING = 1e-2
"""Relative distance up to which two U-Nets are the same model in different precisions: bfloat16 gives 2e-3."""
_BASE = Source(
    "Stable Diffusion 2-base, as a diffusers folder or a single file",
    "`python -m seesr_core download --what base`",
)


@dataclass(kw_only=True, slots=True)
class BaseCheck:
    """How the U-Net of one file compares with a base model's."""

    base: Path
    """The base it was compared with."""
    tensors: int = 0
    """How many weights were compared."""
    identical: int = 0
    """How many of them are equal bit for bit."""
    rounded: int = 0
    """How many of the others are equal once rounded to the narrower of the two types."""
    largest: float = 0.0
    """Largest absolute difference."""
    largest_key: str = ""
    """Key of the weights with the largest difference."""
    _distance: float = field(default=0.0, repr=False)
    _length: float = field(default=0.0, repr=False)

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the weights."""
        return math.sqrt(self._distance / self._length) if self._length else 0.0

    @property
    def equal(self) -> bool:
        """Whether every bit agrees."""
        return self.identical == self.tensors

    @property
    def same_model(self) -> bool:
        """Whether the differences are those of rounding."""
        return self.relative <= _ROUNDING

    def __str__(self) -> str:
        if self.equal:
            return f"equals {self.base} bit for bit ({self.tensors} tensors)"
        return (
            f"differs from {self.base} in {self.tensors - self.identical} of {self.tensors} tensors"
            f"{f' ({self.rounded} by rounding alone)' if self.rounded else ''}, by at most {self.largest:.2g} "
            f"(in {self.largest_key}) and {self.relative:.2g} of their norm"
        )

    def add(self, key: str, ours: Tensor, base: Tensor) -> None:
        """Count one pair of weights."""
        self.tensors += 1
        a, b = ours.float(), base.float()
        self._length += float(b.square().sum(dtype=torch.float64))
        if ours.dtype == base.dtype and torch.equal(ours, base):
            self.identical += 1
            return
        narrow = min(ours.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
        self.rounded += torch.equal(ours.to(narrow), base.to(narrow))
        difference = a - b
        self._distance += float(difference.square().sum(dtype=torch.float64))
        largest = float(difference.abs().max())
        if largest >= self.largest:
            self.largest, self.largest_key = largest, key


def compare_with_base(
    unet_file: Path,
    config: Mapping[str, Any],
    base: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BaseCheck:
    """Compare a published SeeSR U-Net, without its RCA, with a base model's.

    Args:
        unet_file: weights of the folder `unet`.
        config: its diffusers config.
        base: a diffusers folder (or its `unet`), or a single-file checkpoint.
        progress: called with (done, total) tensors.

    Raises:
        WeightsError: `base` is no Stable Diffusion 2, or a U-Net of other weights or sizes.
    """
    header = read_header(unet_file)
    kept = [key for key in header.tensors if RCA not in key]
    other, names = _base_unet(base, config, kept)
    _require_same_shapes(header, other, kept, names, base)
    check = BaseCheck(base=base)
    for keys in portions(header, kept):
        ours = load_portion(unet_file, keys)
        theirs = load_portion(other.path, (names(key) for key in keys))
        for key in keys:
            check.add(key, ours[key], theirs[names(key)])
        progress(check.tensors, len(kept))
    return check


def unet_file_of(folder: Path) -> Path | None:
    """The weights file of a diffusers U-Net or ControlNet folder, safetensors before pickles."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def _base_unet(base: Path, config: Mapping[str, Any], keys: list[str]) -> tuple[Header, Callable[[str], str]]:
    """The header of the file with the base's U-Net, and its name for each diffusers key."""
    if base.is_dir():
        path = unet_file_of(base / "unet") or unet_file_of(base)
        if path is None:
            raise WeightsError(f"{base} has no unet/{_NAMES[0]}: expected {_BASE.name}. Get it with {_BASE.where}.")
        return require(path, sources.BASE_FOLDER, Kind.UNET, Kind.SEESR_UNET).header, lambda key: key
    header = require(base, _BASE, Kind.SD2, Kind.BASE, Kind.UNET, Kind.SEESR_UNET).header
    if f"{UNET_PREFIX}input_blocks.0.0.weight" not in header.tensors:
        return header, lambda key: key
    own: Any = {key: key for key in keys}  # renamed like a state dict, the keys tell their new names
    names = {key: ldm for ldm, key in unet_to_ldm(own, config).items()}
    return header, lambda key: f"{UNET_PREFIX}{names[key]}"


def _require_same_shapes(
    header: Header, other: Header, keys: list[str], names: Callable[[str], str], base: Path
) -> None:
    odd = [key for key in keys if other.shape(names(key)) != header.shape(key)]
    if odd:
        raise WeightsError(
            f"{base} has other weights than {header.path}: {len(odd)} of {len(keys)} are missing or of another shape, "
            f"first {odd[0]} {header.shape(odd[0])}, found {other.shape(names(odd[0]))}. Use {_BASE.name}, from "
            f"{_BASE.where}."
        )
