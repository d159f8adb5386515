"""JPEG compression and decompression on tensors: 4:2:0 chroma, the standard's example tables, no entropy coding.

kornia's codec resamples the chroma and softens the rounding. The published one, which is followed here, averages and
repeats the chroma and really rounds, so that quantisation acts as it does in a file.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

# ITU-T T.81, tables K.1 and K.2. The luma table has vertical frequencies along its columns, as in the published
# implementation; a real encoder has them along the rows. The chroma table is symmetric.
_LUMA = (
    (16, 12, 14, 14, 18, 24, 49, 72),
    (11, 12, 13, 17, 22, 35, 64, 92),
    (10, 14, 16, 22, 37, 55, 78, 95),
    (16, 19, 24, 29, 56, 64, 87, 98),
    (24, 26, 40, 51, 68, 81, 103, 112),
    (40, 58, 57, 87, 109, 104, 121, 100),
    (51, 60, 69, 80, 103, 113, 120, 103),
    (61, 55, 56, 62, 77, 92, 101, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
# JFIF: full-range YCbCr of BT.601.
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
_CHROMA_SHIFT = (0.0, 128.0, 128.0)
_MACROBLOCK = 16


def jpeg(x_B3HW: Tensor, quality_B: Tensor) -> Tensor:
    """Compress and decompress each RGB image in [0, 1] at its own quality (0 < q < 100, libjpeg's scale, not rounded).

    Sides that are no multiple of 16 are filled up with black and cut again, as the published implementation does.
    """
    height, width = x_B3HW.shape[-2:]
    padded = pad(x_B3HW, (0, -width % _MACROBLOCK, 0, -height % _MACROBLOCK))
    ycc = _convert(padded * 255, _TO_YCC) + _per_channel(_CHROMA_SHIFT, padded)
    step_B = quality_to_step(quality_B).to(padded)
    luma = _round_trip(ycc[:, :1], _LUMA, step_B)
    chroma = _round_trip(avg_pool2d(ycc[:, 1:], 2), _CHROMA, step_B)
    chroma = interpolate(chroma, scale_factor=2.0, mode="nearest")
    ycc = torch.cat([luma, chroma], dim=1) - _per_channel(_CHROMA_SHIFT, padded)
    return (_convert(ycc, _TO_RGB).clamp(0, 255) / 255)[..., :height, :width]


def quality_to_step(quality_B: Tensor) -> Tensor:
    """Factor on the quantisation tables: 1 at quality 50, 0 at 100 (libjpeg's rule, without its rounding)."""
    return torch.where(quality_B < 50, 5000 / quality_B, 200 - 2 * quality_B) / 100


def _convert(x_B3HW: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    transposed = torch.tensor(matrix, dtype=x_B3HW.dtype, device=x_B3HW.device).T
    return rearrange(rearrange(x_B3HW, "b c h w -> b h w c") @ transposed, "b h w c -> b c h w")


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def _round_trip(x_BCHW: Tensor, table: tuple[tuple[int, ...], ...], step_B: Tensor) -> Tensor:
    """DCT of 8×8 blocks, division by the steps, rounding, and back.

    The norms are applied after the forward and before the inverse transform, as in the published implementation: in
    float32 the order decides on which side of a rounding edge a coefficient falls.
    """
    height, width = x_BCHW.shape[-2:]
    blocks = rearrange(x_BCHW, "b c (h y) (w x) -> b (c h w) (y x)", y=8, x=8)
    steps = step_B.view(-1, 1, 1) * torch.tensor(table, dtype=x_BCHW.dtype, device=x_BCHW.device).flatten()
    cosines, norms = (part.to(x_BCHW) for part in _dct())
    coefficients = ((blocks - 128) @ cosines * (norms / 4) / steps).round() * steps
    blocks = (coefficients * norms) @ cosines.T / 4 + 128
    return rearrange(blocks, "b (c h w) (y x) -> b c (h y) (w x)", y=8, x=8, h=height // 8, w=width // 8)


def _dct() -> tuple[Tensor, Tensor]:
    """The DCT-II of flattened 8×8 blocks in float64: cosines (64 pixels, 64 frequencies) and norms (64,) × 4."""
    position = torch.arange(8, dtype=torch.float64)
    waves = torch.cos((2 * position[:, None] + 1) * position[None, :] * math.pi / 16)
    norm = torch.ones(8, dtype=torch.float64)
    norm[0] = math.sqrt(0.5)
    return torch.kron(waves, waves), torch.kron(norm, norm)
