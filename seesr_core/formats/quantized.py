"""Matrices in 8 bits: whole numbers and one scale a row, turned back into floats when a file is read.

Weight-only and symmetric: W ≈ q · s with q in −127…127 and s = max|W| / 127 of each row. Only the file is smaller; what
is computed with are ordinary float weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".int8_scale"
"""Appended to a matrix's key, this is the key of its scales."""
_MIN_NUMBERS = 4096
_LEVELS = 127


def is_quantizable(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix worth it: position tables are small and a single output row decides about tags."""
    table = key.endswith("relative_position_bias_table")
    return len(shape) == 2 and shape[0] > 1 and shape[0] * shape[1] >= _MIN_NUMBERS and not table


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) floats to int8 of the same shape and float32 scales (rows, 1)."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _LEVELS
    return (weight / scale).round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scale


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every 8-bit matrix as float32 again; files without any pass through untouched."""
    return {
        key: tensor.float() * tensors[f"{key}{SCALE}"].float() if f"{key}{SCALE}" in tensors else tensor
        for key, tensor in tensors.items()
        if not key.endswith(SCALE)
    }
