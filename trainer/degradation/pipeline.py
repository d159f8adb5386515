"""The second-order degradation of Real-ESRGAN (Wang et al. 2021, fig. 2) with the settings SeeSR was trained with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seesr_core.errors import DataError

from .config import DegradationConfig, StageConfig
from .draws import Draws
from .jpeg import jpeg
from .noise import add_random_noise
from .ops import blur, quantize, resize, sharpen
from .random_kernels import Kernels, draw_kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A batch of training pairs, RGB in [0, 1], on the device of the photos."""

    lr: Tensor
    """Degraded photos, (B, 3, H // scale, W // scale)."""
    hr_usm: Tensor
    """Sharpened photos: the training target, (B, 3, H, W)."""
    lr_upsampled: Tensor
    """`lr`, before any rounding, enlarged to (B, 3, H, W): ControlNet's condition. Bicubic without antialiasing; may
    leave [0, 1] unless the results are quantised."""


@torch.no_grad()
def degrade(hr_B3HW: Tensor, config: DegradationConfig, draws: Draws, kernels: Kernels | None = None) -> Pair:
    """Make training pairs of clean photos.

    As in the published implementation, one draw decides for the whole batch on resize, interpolation, kind of noise,
    second blur and final order; kernels, noise strength, gray noise and JPEG quality are drawn for each image.

    Args:
        hr_B3HW: photos, float RGB in [0, 1], sides of at least `config.min_side`.
        draws: source of every random decision.
        kernels: the images' kernels; drawn first when absent.

    Raises:
        DataError: the batch has another layout or is too small.
    """
    _check_batch(hr_B3HW, config)
    kernels = (draw_kernels(len(hr_B3HW), config, draws) if kernels is None else kernels).to(hr_B3HW.device)
    hr_usm = sharpen(hr_B3HW.float(), config.sharpen)
    lr_size = (hr_B3HW.shape[-2] // config.scale, hr_B3HW.shape[-1] // config.scale)
    x = _first_round(hr_usm, kernels, config, draws)
    x = _second_round(x, kernels, hr_usm.shape, config, draws)
    lr = _finish(x, kernels, lr_size, config, draws).clamp(0, 1)
    lr = _spare_some(lr, hr_usm, config, draws)
    pair = Pair(lr=lr, hr_usm=hr_usm, lr_upsampled=resize(lr, "bicubic", size=hr_usm.shape[-2:]))
    return _quantized(pair) if config.quantize else pair


def _check_batch(hr_B3HW: Tensor, config: DegradationConfig) -> None:
    shape = tuple(hr_B3HW.shape)
    if len(shape) == 4 and shape[1] == 3 and min(shape[2:]) >= config.min_side and hr_B3HW.is_floating_point():
        return
    raise DataError(
        f"Degradation takes float photos of shape (B, 3, H, W) with sides of at least {config.min_side} pixels, "
        f"found {hr_B3HW.dtype} {shape}. Use larger crops or convert the batch."
    )


def _first_round(x: Tensor, kernels: Kernels, config: DegradationConfig, draws: Draws) -> Tensor:
    x = _maybe_blur(x, kernels.first, config.first, draws)
    scale = _draw_scale(config.first, draws)
    x = resize(x, draws.choice(config.resize_modes), scale=scale)
    return _compress(add_random_noise(x, config.first, draws), config.first, draws)


def _second_round(x: Tensor, kernels: Kernels, hr_shape: torch.Size, config: DegradationConfig, draws: Draws) -> Tensor:
    """Everything of the second round but its JPEG, whose place `_finish` draws."""
    x = _maybe_blur(x, kernels.second, config.second, draws)
    scale = _draw_scale(config.second, draws)
    size = (int(hr_shape[-2] / config.scale * scale), int(hr_shape[-1] / config.scale * scale))
    x = resize(x, draws.choice(config.resize_modes), size=size)
    return add_random_noise(x, config.second, draws)


def _finish(x: Tensor, kernels: Kernels, lr_size: tuple[int, int], config: DegradationConfig, draws: Draws) -> Tensor:
    """Resize to LR size and low-pass, before or after the last JPEG."""
    sinc_first = draws.chance(config.final_sinc.before_jpeg_probability)
    if not sinc_first:
        x = _compress(x, config.second, draws)
    x = blur(resize(x, draws.choice(config.resize_modes), size=lr_size), kernels.final)
    return _compress(x, config.second, draws) if sinc_first else x


def _maybe_blur(x: Tensor, kernels_BKK: Tensor, config: StageConfig, draws: Draws) -> Tensor:
    always = config.blur_probability == 1
    return blur(x, kernels_BKK) if always or draws.chance(config.blur_probability) else x


def _draw_scale(config: StageConfig, draws: Draws) -> float:
    direction = draws.choice(("up", "down", "keep"), config.resize_weights)
    low, high = config.resize_range
    if direction == "keep":
        return 1.0
    return draws.uniform(1.0, high) if direction == "up" else draws.uniform(low, 1.0)


def _compress(x: Tensor, config: StageConfig, draws: Draws) -> Tensor:
    return jpeg(x.clamp(0, 1), draws.uniforms(len(x), *config.jpeg_quality))


def _spare_some(lr: Tensor, hr_usm: Tensor, config: DegradationConfig, draws: Draws) -> Tensor:
    """Replace the images that are to stay clean by the shrunk photo."""
    if config.clean_probability == 0:
        return lr
    clean_B = draws.uniforms(len(lr), 0.0, 1.0) < config.clean_probability
    shrunk = resize(hr_usm, "area", size=lr.shape[-2:])
    return torch.where(clean_B.to(lr.device).view(-1, 1, 1, 1), shrunk, lr)


def _quantized(pair: Pair) -> Pair:
    return Pair(lr=quantize(pair.lr), hr_usm=quantize(pair.hr_usm), lr_upsampled=quantize(pair.lr_upsampled))
