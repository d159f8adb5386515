"""Blur kernels in float64: Gaussian, generalized Gaussian, plateau, circular low-pass.

All are square with an odd side K and sum to 1; x runs along the columns, y along the rows, both from the centre.
Formulas: Wang et al., "Real-ESRGAN" (2021), sec. 3.1 (Gaussian families) and eq. 6 (low-pass).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def gaussian_kernel(size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0) -> Tensor:
    """(size, size) Gaussian with standard deviations in pixels, its first axis turned by `rotation` radians."""
    return _normalized(torch.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, rotation)))


def generalized_kernel(size: int, sigma_x: float, sigma_y: float, rotation: float, beta: float) -> Tensor:
    """exp(-½ d^(2β)) of the distance d in standard deviations: heavier tails below β = 1, a flatter top above."""
    return _normalized(torch.exp(-0.5 * _squared_distance(size, sigma_x, sigma_y, rotation) ** beta))


def plateau_kernel(size: int, sigma_x: float, sigma_y: float, rotation: float, beta: float) -> Tensor:
    """1 / (1 + d^(2β)) of the distance d in standard deviations."""
    return _normalized(1 / (1 + _squared_distance(size, sigma_x, sigma_y, rotation) ** beta))


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """(size, size) ideal circular low-pass, ω J₁(ω r) / (2π r), with the cut-off ω in radians per pixel."""
    x, y = _grid(size)
    radius = torch.hypot(x, y)
    # At r = 0 the formula is 0/0; its limit is ω² / 4π.
    kernel = cutoff * _bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return _normalized(kernel)


def delta_kernel(size: int) -> Tensor:
    """(size, size) kernel that changes nothing."""
    kernel = torch.zeros(size, size, dtype=torch.float64)
    kernel[size // 2, size // 2] = 1.0
    return kernel


def pad_kernel(kernel: Tensor, canvas: int) -> Tensor:
    """The kernel in the centre of (canvas, canvas) zeros; both sides odd, `canvas` not the smaller one."""
    margin = (canvas - kernel.shape[-1]) // 2
    return pad(kernel, (margin,) * 4)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    return axis[None, :].expand(size, size), axis[:, None].expand(size, size)


def _bessel_j1(x: Tensor) -> Tensor:
    """J₁ by Bessel's integral, (1/π) ∫₀^π cos(τ − x sin τ) dτ, to float64 precision.

    The integrand is periodic, so the error of the midpoint rule vanishes faster than any power once 2·steps exceeds x.
    `torch.special.bessel_j1` is off by up to 5e-7 between 5 and 10, more than kernels may differ.
    """
    steps = 32 + int(x.max()) // 2
    tau = (torch.arange(steps, dtype=x.dtype) + 0.5) * (math.pi / steps)
    return torch.cos(tau - x[..., None] * tau.sin()).mean(-1)


def _squared_distance(size: int, sigma_x: float, sigma_y: float, rotation: float) -> Tensor:
    """Squared distance from the centre in standard deviations (Mahalanobis), (size, size)."""
    x, y = _grid(size)
    cos, sin = math.cos(rotation), math.sin(rotation)
    along, across = cos * x + sin * y, cos * y - sin * x
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def _normalized(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum()
