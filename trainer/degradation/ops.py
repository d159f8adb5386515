"""The single operations on batches x_B3HW (float32, [0, 1] unless said otherwise); none draws anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kornia.filters import filter2d, get_gaussian_kernel1d
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .config import ResizeMode, SharpenConfig

# ITU-R BT.601 luma with the four digits torchvision uses; they sum to 0.9999.
_GRAY = (0.2989, 0.587, 0.114)


def blur(x_BCHW: Tensor, kernels_BKK: Tensor) -> Tensor:
    """Correlate each image with its own kernel, or all with one (1, K, K); the border is mirrored."""
    # kornia before 0.9, the newest for Python 3.10, takes no other layout in memory.
    padded = reflect_pad(x_BCHW, kernels_BKK.shape[-1] // 2).contiguous()
    return filter2d(padded, kernels_BKK.to(x_BCHW), padding="valid")


def reflect_pad(x_BCHW: Tensor, margin: int) -> Tensor:
    """Mirror the image outwards without repeating its edge, several times over where it is smaller than the margin."""
    height, width = x_BCHW.shape[-2:]
    if margin < min(height, width):
        return pad(x_BCHW, (margin,) * 4, mode="reflect")
    rows, columns = _mirrored(height, margin, x_BCHW.device), _mirrored(width, margin, x_BCHW.device)
    return x_BCHW.index_select(-2, rows).index_select(-1, columns)


def _mirrored(length: int, margin: int, device: torch.device) -> Tensor:
    """The pixel of the axis that each pixel of the padded axis shows."""
    period = max(2 * (length - 1), 1)
    position = torch.arange(-margin, length + margin, device=device) % period
    return torch.minimum(position, period - position)


def sharpen_window(config: SharpenConfig) -> Tensor:
    """The Gaussian of the unsharp mask along one axis, (1, K) float64."""
    return get_gaussian_kernel1d(config.window, config.sigma, dtype=torch.float64)


def sharpen(x_BCHW: Tensor, config: SharpenConfig) -> Tensor:
    """Unsharp masking where the difference to the blurred image exceeds the threshold, with a soft border around it."""
    gaussian = _fast_gaussian if config.fast else _gaussian
    window = sharpen_window(config)
    detail = x_BCHW - gaussian(x_BCHW, window)
    mask = (detail.abs() * 255 > config.threshold).to(x_BCHW.dtype)
    soft = gaussian(mask, window)
    sharp = (x_BCHW + config.weight * detail).clamp(0, 1)
    return soft * sharp + (1 - soft) * x_BCHW


def _gaussian(x_BCHW: Tensor, window_1K: Tensor) -> Tensor:
    return blur(x_BCHW, (window_1K.T @ window_1K)[None])


def _fast_gaussian(x_BCHW: Tensor, window_1K: Tensor) -> Tensor:
    window = window_1K.to(x_BCHW)
    rows, columns = _blur_matrix(x_BCHW.shape[-2], window), _blur_matrix(x_BCHW.shape[-1], window)
    return rows @ x_BCHW @ columns.T


def _blur_matrix(length: int, window_1K: Tensor) -> Tensor:
    """(length, length): row i holds the weights of the pixels that make pixel i, mirrored border included."""
    size = window_1K.shape[-1]
    sources = _mirrored(length, size // 2, window_1K.device).unfold(0, size, 1)
    return window_1K.new_zeros(length, length).scatter_add_(1, sources, window_1K.expand(length, -1))


def resize(
    x_BCHW: Tensor, mode: ResizeMode, *, scale: float | None = None, size: Sequence[int] | None = None
) -> Tensor:
    """Resize to `size`, or by `scale` (which then is the sampling step, too), without antialiasing."""
    return interpolate(x_BCHW, scale_factor=scale, size=None if size is None else list(size), mode=mode)


def mix_gray(color_B3HW: Tensor, gray_B1HW: Tensor, is_gray_B: Tensor) -> Tensor:
    """Noise that is equal in the three channels for the images marked in `is_gray_B`, coloured for the others."""
    return torch.where(is_gray_B.view(-1, 1, 1, 1), gray_B1HW, color_B3HW)


def to_gray(x_B3HW: Tensor) -> Tensor:
    """Luma, (B, 1, H, W)."""
    red, green, blue = (x_B3HW[:, channel : channel + 1] * weight for channel, weight in enumerate(_GRAY))
    return red + green + blue


def quantize(x_BCHW: Tensor) -> Tensor:
    """Saturate and round to the 256 levels of 8-bit images (half to even), still in [0, 1]."""
    return (x_BCHW * 255).round().clamp(0, 255) / 255


def photon_levels(x_BCHW: Tensor) -> Tensor:
    """Photons that stand for 1.0, (B, 1, 1, 1): the levels in each quantised image, rounded up to a power of 2."""
    levels = (x_BCHW * 255).round().long().flatten(1)
    present = torch.zeros(len(levels), 256, device=levels.device).scatter_(1, levels, 1.0)
    powers = torch.tensor([2.0**exponent for exponent in range(9)], device=levels.device)
    return powers[torch.searchsorted(powers, present.sum(1))].view(-1, 1, 1, 1)
