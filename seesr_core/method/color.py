"""Colour fix: the result takes its colours from the upscaled LR picture. Pictures are float (B, 3, H, W) in [0, 1].

Every channel stands for itself, so callers short of memory may pass one channel at a time.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..errors import ImageError, SettingsError

ColorFix = Literal["adain", "wavelet", "none"]
COLOR_FIXES: tuple[ColorFix, ...] = ("adain", "wavelet", "none")

_VARIANCE_EPS = 1e-5
_LEVELS = 5


def color_fix(image_B3HW: Tensor, reference_B3HW: Tensor, method: ColorFix = "adain") -> Tensor:
    """`image` with the colours of `reference` (same shape); float32, not clamped; "none" returns it unchanged.

    Raises:
        SettingsError: unknown method.
        ImageError: the shapes differ.
    """
    if method not in COLOR_FIXES:
        raise SettingsError(f"Unknown colour fix {method!r}: choose one of {', '.join(COLOR_FIXES)}.")
    if method == "none":
        return image_B3HW
    if image_B3HW.shape != reference_B3HW.shape:
        raise ImageError(
            f"Colour fix needs the prepared LR picture at the result's size, expected {tuple(image_B3HW.shape)}, "
            f"found {tuple(reference_B3HW.shape)}."
        )
    return (adain if method == "adain" else wavelet)(image_B3HW, reference_B3HW)


def adain(image_B3HW: Tensor, reference_B3HW: Tensor) -> Tensor:
    """Each channel shifted and stretched to the reference's mean and standard deviation, float32.

    As the published implementation: unbiased variance over the picture, plus 1e-5.
    """
    mean, std = _mean_std(image_B3HW)
    mean_reference, std_reference = _mean_std(reference_B3HW)
    return (image_B3HW.float() - mean).div_(std).mul_(std_reference).add_(mean_reference)


def _mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    x32 = x.float()
    variance = x32.var(dim=(-2, -1), keepdim=True) + _VARIANCE_EPS
    return x32.mean(dim=(-2, -1), keepdim=True), variance.sqrt()


def wavelet(image_B3HW: Tensor, reference_B3HW: Tensor) -> Tensor:
    """The image's fine detail on the reference's coarse colours (five à-trous levels), float32.

    high(image) + low(reference); as blurring is linear, image + low(reference − image) is the same at half the work.
    """
    image32 = image_B3HW.float()
    return wavelet_low(reference_B3HW.float() - image32).add_(image32)


def wavelet_low(x_B3HW: Tensor) -> Tensor:
    """What five blurs leave, float32: [1 2 1]/4 each way, dilated by 1, 2, 4, 8, 16, borders replicated."""
    low = x_B3HW.float()
    for level in range(_LEVELS):
        low = _blur(_blur(low, 2**level, -1), 2**level, -2)
    return low


def _blur(x: Tensor, radius: int, dim: int) -> Tensor:
    padding = (radius, radius, 0, 0) if dim == -1 else (0, 0, radius, radius)
    padded = F.pad(x, padding, mode="replicate")
    size = x.shape[dim]
    sides = padded.narrow(dim, 0, size) + padded.narrow(dim, 2 * radius, size)
    return sides.mul_(0.25).add_(x, alpha=0.5)
