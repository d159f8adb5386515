"""Camera noise on batches x_B3HW in [0, 1]: Gaussian and Poisson, coloured or gray image by image."""

from __future__ import annotations

from torch import Tensor

from .config import StageConfig
from .draws import Draws
from .ops import mix_gray, photon_levels, quantize, to_gray


def add_random_noise(x_B3HW: Tensor, config: StageConfig, draws: Draws) -> Tensor:
    """Gaussian or Poisson noise (one kind for the batch) of drawn strength (per image), clamped to [0, 1]."""
    gaussian = draws.chance(config.gaussian_probability)
    low, high = config.gaussian_sigma if gaussian else config.poisson_scale
    strength_B = draws.uniforms(len(x_B3HW), low, high)
    is_gray_B = draws.uniforms(len(x_B3HW), 0.0, 1.0) < config.gray_probability
    noise = gaussian_noise if gaussian else poisson_noise
    return (x_B3HW + noise(x_B3HW, strength_B, is_gray_B, draws)).clamp(0, 1)


def gaussian_noise(x_B3HW: Tensor, sigma_B: Tensor, is_gray_B: Tensor, draws: Draws) -> Tensor:
    """Normal noise with standard deviations in 8-bit levels.

    As in the published implementation the gray images of a batch share one pattern, drawn first and only if there are
    any.
    """
    pattern = draws.normal(x_B3HW.shape[-2:]).to(x_B3HW) if is_gray_B.any() else None
    sigma = sigma_B.to(x_B3HW).view(-1, 1, 1, 1)
    color = draws.normal(x_B3HW.shape).to(x_B3HW) * sigma / 255
    return color if pattern is None else mix_gray(color, pattern * sigma / 255, is_gray_B.to(x_B3HW.device))


def poisson_noise(x_B3HW: Tensor, scale_B: Tensor, is_gray_B: Tensor, draws: Draws) -> Tensor:
    """Shot noise times `scale_B`: of the colours, or of the luma for gray images (drawn first, if there are any)."""
    gray = _shot_noise(to_gray(x_B3HW), draws) if is_gray_B.any() else None
    noise = _shot_noise(x_B3HW, draws)
    if gray is not None:
        noise = mix_gray(noise, gray, is_gray_B.to(x_B3HW.device))
    return noise * scale_B.to(x_B3HW).view(-1, 1, 1, 1)


def _shot_noise(x_BCHW: Tensor, draws: Draws) -> Tensor:
    """Poisson counts minus their mean; the number of photons follows the number of levels in each image."""
    image = quantize(x_BCHW)
    photons = photon_levels(image)
    return draws.poisson(image * photons).to(image) / photons - image
