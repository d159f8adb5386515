"""The diffusion's noise schedule: cumulative alphas, timesteps, LR embedding (LRE) and the spaced DDPM step.

Symbols: `acp` is the cumulative alpha product ᾱ_t of a timestep t in 0 … 999, `eps` the predicted noise ε_θ, and
`sigma` = sqrt((1 − acp) / acp), the noise level of the variance-exploding form. Latents are scaled by the VAE's factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..errors import SettingsError

Spacing = Literal["leading", "trailing"]
SPACINGS: tuple[Spacing, ...] = ("leading", "trailing")

TRAIN_TIMESTEPS = 1000
LAST_TIMESTEP = TRAIN_TIMESTEPS - 1
BETA_START, BETA_END = 0.00085, 0.012
_LEADING_OFFSET = 1
_MIN_VARIANCE = 1e-20
_START_STEPS, _START_NOISE = 1.5, 0.01
"""How far, in steps of the schedule or in the share of noise, an LR embedding may lie above the first timestep."""

_Number = TypeVar("_Number", float, Tensor)


def alphas_cumprod() -> Tensor:
    """acp of timesteps 0 … 999: float32, shape (1000,), of Stable Diffusion 2's "scaled linear" betas."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_TIMESTEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


@lru_cache(maxsize=1)
def _acp_table() -> tuple[float, ...]:
    return tuple(alphas_cumprod().tolist())


def acp_at(t: int) -> float:
    """acp of timestep `t`; 1 (no noise) for a negative one, which stands for "after the last step"."""
    return _acp_table()[t] if t >= 0 else 1.0


def sigma_from_acp(acp: _Number) -> _Number:
    """Noise level of the variance-exploding form, for a float or elementwise for a tensor; acp in (0, 1]."""
    return ((1.0 - acp) / acp) ** 0.5


def acp_from_sigma(sigma: _Number) -> _Number:
    """Inverse of `sigma_from_acp`."""
    return 1.0 / (sigma * sigma + 1.0)


def timesteps(steps: int, *, spacing: Spacing = "leading", start_timestep: int = LAST_TIMESTEP) -> list[int]:
    """Timesteps to denoise, falling; those above `start_timestep` are left out, so fewer than `steps` may remain.

    "leading" with an offset of 1 is what the published implementation runs (50 steps: 981 … 21, 1; 2 steps: 501, 1);
    "trailing" starts at the very end of the training schedule (2 steps: 999, 499), as SD-turbo was trained.

    Raises:
        SettingsError: `steps`, `spacing` or `start_timestep` is out of range, or no timestep remains.
    """
    if not 1 <= steps <= TRAIN_TIMESTEPS:
        raise SettingsError(f"steps must be between 1 and {TRAIN_TIMESTEPS}, not {steps}.")
    check_start_timestep(start_timestep)
    if spacing == "leading":
        ratio = TRAIN_TIMESTEPS // steps
        grid = [i * ratio + _LEADING_OFFSET for i in reversed(range(steps))]
    elif spacing == "trailing":
        grid = [round(TRAIN_TIMESTEPS - i * (TRAIN_TIMESTEPS / steps)) - 1 for i in range(steps)]
    else:
        raise SettingsError(f"Unknown timestep spacing {spacing!r}: choose one of {', '.join(SPACINGS)}.")
    kept = [t for t in grid if t <= start_timestep]
    if not kept:
        raise SettingsError(
            f"{steps} {spacing} steps have no timestep at or below start timestep {start_timestep} "
            f"(the lowest is {grid[-1]}): raise the start timestep or the number of steps."
        )
    return kept


def check_start_timestep(start_timestep: int) -> None:
    """Raise SettingsError unless `start_timestep` is a timestep of the training schedule."""
    if not 0 <= start_timestep <= LAST_TIMESTEP:
        raise SettingsError(f"The start timestep must be between 0 and {LAST_TIMESTEP}, not {start_timestep}.")


def q_sample(z: Tensor, noise: Tensor, acp: float | Tensor) -> Tensor:
    """The forward process q(z_t | z): z_t = √ᾱ·z + √(1 − ᾱ)·ε.

    `z` is a scaled latent and `noise` standard normal, both (B, C, h, w); `acp` is ᾱ_t, one for the whole batch or a
    tensor that broadcasts, such as (B, 1, 1, 1).
    """
    return acp**0.5 * z + (1.0 - acp) ** 0.5 * noise


def x0_from_eps(x: Tensor, eps: Tensor, acp: float | Tensor) -> Tensor:
    """The clean latent that `eps` implies, (x − √(1 − ᾱ)·ε) / √ᾱ; arguments as in `q_sample`, which it inverts."""
    return (x - (1.0 - acp) ** 0.5 * eps) / acp**0.5


def belongs_to_start(start_timestep: int, first: float, second: float) -> bool:
    """Whether an LR embedding at `start_timestep` may be denoised from the lower timestep `first` on, then `second`.

    The published start lies a little above the first timestep (999 above 981, or 501 of two steps): up to one and a
    half steps of the schedule, or as much as changes the share of noise by no more than a hundredth. From further
    below the network would take the surplus of noise for the photo's own colours and detail.
    """
    if start_timestep - first <= _START_STEPS * (first - second):
        return True
    noise_at_start, noise_at_first = ((1.0 - acp_at(t)) ** 0.5 for t in (start_timestep, round(first)))
    return noise_at_start - noise_at_first <= _START_NOISE


def start_for(run: Sequence[int], start_timestep: int = LAST_TIMESTEP) -> int:
    """The timestep that the LR latent is noised to before the timesteps `run` (falling) are denoised.

    `start_timestep`, or the first of `run` where that lies too far below it (see `belongs_to_start`).
    """
    second = run[1] if len(run) > 1 else 0
    return start_timestep if belongs_to_start(start_timestep, run[0], second) else run[0]


def lr_embedding(z_lr: Tensor, noise: Tensor, start_timestep: int = LAST_TIMESTEP) -> Tensor:
    """Start of sampling from the LR latent noised to `start_timestep` (LRE, §3.4 of the paper).

    `z_lr` is the scaled latent of the prepared LR image, `noise` standard normal, both (B, 4, h, w). The published
    implementation noises to t = 999 although its first denoised step is 981; that is kept.

    Raises:
        SettingsError: `start_timestep` lies outside 0 … 999.
    """
    check_start_timestep(start_timestep)
    return q_sample(z_lr, noise, acp_at(start_timestep))


def exploding_noise(z_lr: Tensor, noise: Tensor, *, acp: float, sigma: float, scale: float) -> Tensor:
    """The LR embedding for samplers of the variance-exploding form, in the place where they take their noise.

    Such a sampler starts from x = z_lr + scale · (what it takes for noise), and its network sees x / sqrt(1 + sigma²)
    at its first noise level `sigma`. With this function's result the network sees `lr_embedding` of `acp`, exactly.

    Args:
        z_lr: scaled latent of the prepared LR image, (B, 4, h, w).
        noise: standard normal, same shape.
        acp: cumulative alpha of the timestep that z_lr is noised to.
        sigma: first noise level of the sampler, above 0.
        scale: factor that the sampler gives its noise: `sigma`, or sqrt(1 + sigma²) where it starts from pure noise.
    """
    z32 = z_lr.float()
    seen = q_sample(z32, noise.float(), acp)
    return (((1.0 + sigma**2) ** 0.5 * seen - z32) / scale).to(z_lr.dtype)


def ddpm_variance(t: int, *, previous: int) -> float:
    """Variance of the step t → previous, "fixed small": that of the true posterior, at least 1e-20."""
    acp, acp_previous = acp_at(t), acp_at(previous)
    return max((1.0 - acp_previous) / (1.0 - acp) * (1.0 - acp / acp_previous), _MIN_VARIANCE)


def ddpm_step(eps: Tensor, t: int, x: Tensor, noise: Tensor, *, previous: int) -> Tensor:
    """One ancestral step from timestep `t` to `previous` (the next lower one that is run; −1 after the last).

    `eps`, `x`, `noise`: (B, 4, h, w). No clipping. Computed in float32 and returned in the dtype of `x`. With leading
    spacing this is diffusers' DDPMScheduler as published; `previous` also fits uneven grids.
    """
    acp, acp_previous = acp_at(t), acp_at(previous)
    alpha = acp / acp_previous
    x32 = x.float()
    x0 = x0_from_eps(x32, eps.float(), acp)
    x0_share = acp_previous**0.5 * (1.0 - alpha) / (1.0 - acp)
    x_share = alpha**0.5 * (1.0 - acp_previous) / (1.0 - acp)
    std = ddpm_variance(t, previous=previous) ** 0.5
    return (x0_share * x0 + x_share * x32 + std * noise.float()).to(x.dtype)
