"""Colour fix: float results, the wavelet's two halves, and the 8-bit pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from seesr_core.method.color import color_fix, wavelet_low
from seesr_core.pictures.sizes import to_u8

from ..compare import Comparison

GROUP = "color_fix"
TOLERANCE = 1e-5


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Every saved quantity of every pair of pictures."""
    inputs = load_file(folder / GROUP / "inputs.safetensors")
    outputs = load_file(folder / GROUP / "outputs.safetensors")
    for key, expected in outputs.items():
        pair, _, quantity = key.rpartition(".")
        target, source = (_picture(inputs[f"{pair}.{role}_u8"]) for role in ("target", "source"))
        actual = compute(quantity, target, source)
        if quantity.endswith("_u8"):
            yield Comparison.u8(GROUP, pair, quantity, actual, expected)
        else:
            yield Comparison.of(GROUP, pair, quantity, actual, expected, TOLERANCE)


def compute(quantity: str, target_1CHW: Tensor, source_1CHW: Tensor) -> Tensor:
    """`target_low_f32`, `target_high_f32`, or `<method>_f32` (C, H, W) and `<method>_u8` (H, W, C)."""
    if quantity == "target_low_f32":
        return wavelet_low(target_1CHW)[0]
    if quantity == "target_high_f32":
        return (target_1CHW - wavelet_low(target_1CHW))[0]
    method, _, kind = quantity.rpartition("_")
    fixed = color_fix(target_1CHW, source_1CHW, method)[0]  # type: ignore[arg-type]
    return to_u8(fixed, "cut").permute(1, 2, 0) if kind == "u8" else fixed


def _picture(picture_u8_HWC: Tensor) -> Tensor:
    return picture_u8_HWC.permute(2, 0, 1)[None].float() / 255
