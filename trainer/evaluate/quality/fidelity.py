"""How near a picture comes to its original: PSNR and SSIM of the luma, in float64 on levels 0 … 255.

Pictures are uint8 RGB (3, H, W), compared as a whole; both pictures of a comparison have one size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

IDENTICAL_DB = 100.0
SSIM_SIDE = 11
_STRIP_PIXELS = 1 << 20
_STUDIO_RGB = (65.481, 128.553, 24.966)
_FULL_RGB = (0.299, 0.587, 0.114)
_SSIM_SIGMA = 1.5
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def studio_luma(image_3HW: Tensor) -> Tensor:
    """Y of YCbCr after BT.601 in studio range, 16 … 235, not rounded: float64 (H, W). The "Y channel" of the paper."""
    return 16.0 + _weighted(image_3HW, _STUDIO_RGB) / 255.0


def full_luma(image_3HW: Tensor) -> Tensor:
    """Y of BT.601 in full range, 0 … 255, not rounded: float64 (H, W)."""
    return _weighted(image_3HW, _FULL_RGB)


def full_luma_rows(image_3HW: Tensor) -> Callable[[int, int], Tensor]:
    """`full_luma` of the rows [start, stop) that are asked for, so that it never exists as a whole."""
    return lambda start, stop: full_luma(image_3HW[:, start:stop])


def _weighted(image_3HW: Tensor, weights: tuple[float, float, float]) -> Tensor:
    return torch.tensordot(torch.tensor(weights, dtype=torch.float64), image_3HW.double(), dims=1)


def _strips(image_3HW: Tensor, original_3HW: Tensor, overlap: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The lumas of both pictures in strips that share `overlap` rows: memory does not grow with the picture."""
    _, height, width = image_3HW.shape
    step = max(_STRIP_PIXELS // width, 1)
    for top in range(0, height - overlap, step):
        rows = slice(top, min(top + step + overlap, height))
        yield studio_luma(image_3HW[:, rows]), studio_luma(original_3HW[:, rows])


def psnr_y(image_3HW: Tensor, original_3HW: Tensor) -> float:
    """Peak signal-to-noise ratio of the studio luma in dB, peak 255; at most 100 dB, which identical pictures get."""
    total = sum(float((x - y).square().sum()) for x, y in _strips(image_3HW, original_3HW))
    if total == 0:
        return IDENTICAL_DB
    mse = total / image_3HW[0].numel()
    return min(10.0 * math.log10(255.0**2 / mse), IDENTICAL_DB)


def ssim_y(image_3HW: Tensor, original_3HW: Tensor) -> float | None:
    """Structural similarity of the studio luma (Wang et al. 2004): Gaussian window 11², σ = 1.5, K = 0.01 and 0.03.

    The mean is over the places where the whole window lies inside; None if a side is below 11 pixels.
    """
    if min(image_3HW.shape[1:]) < SSIM_SIDE:
        return None
    parts = (_ssim_map(x, y) for x, y in _strips(image_3HW, original_3HW, SSIM_SIDE - 1))
    sums, counts = zip(*((float(part.sum()), part.numel()) for part in parts), strict=True)
    return sum(sums) / sum(counts)


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, cov = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    structure = (2 * cov + _SSIM_C2) / (var_x + var_y + _SSIM_C2)
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    return luminance * structure


def _blur(maps_NHW: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_SIDE, dtype=torch.float64) - SSIM_SIDE // 2
    window = torch.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    window = window / window.sum()
    rows = F.conv2d(maps_NHW[:, None], window.view(1, 1, -1, 1))
    return F.conv2d(rows, window.view(1, 1, 1, -1))[:, 0]
