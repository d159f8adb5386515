"""The kernels of a batch, drawn image by image with the probabilities of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import BlurConfig, DegradationConfig, FinalSincConfig, KernelFamily, Range
from .draws import Draws
from .kernels import (
    delta_kernel,
    gaussian_kernel,
    generalized_kernel,
    pad_kernel,
    plateau_kernel,
    sinc_kernel,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The three kernels of every image, each (B, K, K) float32."""

    first: Tensor
    """Blur of the first round."""
    second: Tensor
    """Blur of the second round."""
    final: Tensor
    """Last low-pass, or the kernel that changes nothing."""

    def to(self, device: torch.device) -> Kernels:
        """The same kernels on another device."""
        return Kernels(first=self.first.to(device), second=self.second.to(device), final=self.final.to(device))


def draw_kernels(batch: int, config: DegradationConfig, draws: Draws) -> Kernels:
    """Draw first, second and final kernel of one image after the other, padded to `config.kernel_canvas`."""
    rows = [_draw_image(config, draws) for _ in range(batch)]
    first, second, final = (
        torch.stack([pad_kernel(kernel, config.kernel_canvas) for kernel in column]).float()
        for column in zip(*rows, strict=True)
    )
    return Kernels(first=first, second=second, final=final)


def _draw_image(config: DegradationConfig, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    first = draw_blur_kernel(config.first.blur, draws)
    second = draw_blur_kernel(config.second.blur, draws)
    return first, second, draw_final_kernel(config.final_sinc, draws)


def draw_blur_kernel(config: BlurConfig, draws: Draws) -> Tensor:
    """One kernel of a drawn size, (K, K) float64: now and then a sinc, else one of the Gaussian families."""
    size = draws.choice(config.sizes)
    if draws.chance(config.sinc_probability):
        cutoff = config.sinc_cutoff if size < config.large_sinc_size else config.large_sinc_cutoff
        return sinc_kernel(size, draws.uniform(*cutoff))
    return _draw_gaussian(draws.choice(config.families, config.family_weights), size, config, draws)


def draw_final_kernel(config: FinalSincConfig, draws: Draws) -> Tensor:
    """The last low-pass, (K, K) float64, or a single 1 where the image gets none."""
    if not draws.chance(config.probability):
        return delta_kernel(1)
    size = draws.choice(config.sizes)
    return sinc_kernel(size, draws.uniform(*config.cutoff))


def _draw_gaussian(family: KernelFamily, size: int, config: BlurConfig, draws: Draws) -> Tensor:
    sigma_x = sigma_y = draws.uniform(*config.sigma)
    rotation = 0.0
    if family.endswith("aniso"):
        sigma_y, rotation = draws.uniform(*config.sigma), draws.uniform(*config.rotation)
    if family.startswith("generalized"):
        return generalized_kernel(size, sigma_x, sigma_y, rotation, _draw_beta(config.generalized_beta, draws))
    if family.startswith("plateau"):
        return plateau_kernel(size, sigma_x, sigma_y, rotation, _draw_beta(config.plateau_beta, draws))
    return gaussian_kernel(size, sigma_x, sigma_y, rotation)


def _draw_beta(beta: Range, draws: Draws) -> float:
    """Below or above 1 with equal probability, so that both sides are met however lopsided the range is."""
    return draws.uniform(beta[0], 1.0) if draws.chance(0.5) else draws.uniform(1.0, beta[1])
