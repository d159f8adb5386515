"""Steering the prediction after the networks: guidance where the prompt is about something, and the fidelity dial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .schedule import LAST_TIMESTEP, acp_at, sigma_from_acp, x0_from_eps

SpatialGuidance = Literal["off", "auto"]
SPATIAL_GUIDANCE: tuple[SpatialGuidance, ...] = ("off", "auto")

DECAY = 4.0
"""How the fidelity dial falls with the noise, if nothing else is asked for: as in SUPIR (Yu et al., CVPR 2024)."""

_Number = TypeVar("_Number", float, Tensor)


def guided(negative: Tensor, positive: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance: negative + cfg · (positive − negative), of noises or of clean latents alike."""
    return negative + cfg * (positive - negative)


def guides(interval: tuple[float, float], t: float) -> bool:
    """Whether guidance acts at timestep `t`: START ≤ 1 − t / 999 ≤ END, as in the limited interval of Kynkäänniemi et
    al. (NeurIPS 2024), in shares of the noise schedule: 0 is its noisy end, 1 the clean one.
    """
    start, end = interval
    return start <= 1.0 - t / LAST_TIMESTEP <= end


def targeted(negative: Tensor, positive: Tensor, share: Tensor) -> Tensor:
    """The positive prediction as far as `share` goes, else the negative one: negative + M · (positive − negative).

    Guided by any scale this is negative + cfg · M · (positive − negative), the spatially targeted guidance of SRSR
    (NeurIPS 2025): where M is 0 the prediction without the prompt stays as it is. Where M is 1 the positive
    prediction comes back bit for bit.

    Args:
        negative: prediction (B, C, h, w) without the prompt.
        positive: prediction with it.
        share: M, (B or 1, 1, h, w) in [0, 1].
    """
    share = share.to(positive)
    return torch.where(share == 1, positive, negative + share * (positive - negative))


def pull(fidelity: float, decay: float, sigma: _Number, sigma_max: float) -> _Number:
    """Share by which the clean latent is pulled to the photo at noise level `sigma`: s · (σ / σ_max)^p.

    Args:
        fidelity: s, 0 … 1; 0 pulls not at all.
        decay: p, at least 0; the larger, the earlier the pull ends, 0 holds it to the end.
        sigma: noise level of the step, sqrt((1 − acp) / acp).
        sigma_max: the run's first and highest noise level, so that the dial means the same whichever noise level the
            run starts from.
    """
    return fidelity * (sigma / sigma_max) ** decay


def pulled(x0: Tensor, z_lr: Tensor, share: float | Tensor) -> Tensor:
    """A clean latent that is `share` of the way nearer to that of the photo: x0 + share · (z_lr − x0)."""
    return x0 + share * (z_lr - x0)


def pulled_noise(eps: Tensor, x: Tensor, z_lr: Tensor, share: float, acp: float) -> Tensor:
    """The same for a sampler that goes by the noise: the ε that implies the pulled clean latent.

    Args:
        eps: predicted noise (B, C, h, w).
        x: the latents it was predicted in, √acp · x0 + √(1 − acp) · ε.
        z_lr: scaled latent of the prepared photo.
        share: see `pull`; at 0 `eps` is given back as it is.
        acp: cumulative alpha of the step.
    """
    if share == 0:
        return eps
    x0 = pulled(x0_from_eps(x.float(), eps.float(), acp), z_lr.float(), share)
    return ((x.float() - acp**0.5 * x0) / (1.0 - acp) ** 0.5).to(eps.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaithfulDenoiser:
    """A denoiser (x, t) -> ε whose clean latents are pulled to the photo's by the fidelity dial."""

    denoise: Callable[[Tensor, int], Tensor]
    """Predicts the noise."""
    z_lr: Tensor
    """Scaled latents of the prepared photos, (B, C, h, w)."""
    timesteps: Sequence[int]
    """Of the run, falling."""
    fidelity: float
    """0 gives the prediction back as it is."""
    decay: float = DECAY
    """The larger, the earlier the pull ends."""

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """The noise that implies the pulled clean latents, in the prediction's dtype."""
        sigma_max = sigma_from_acp(acp_at(self.timesteps[0]))
        share = pull(self.fidelity, self.decay, sigma_from_acp(acp_at(t)), sigma_max)
        return pulled_noise(self.denoise(x, t), x, self.z_lr.to(x.device), share, acp_at(t))
