"""NOISE objects whose image i of a batch draws from seed + i, and the one that starts sampling from the LR latent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from ...seesr_core.errors import SettingsError
from ...seesr_core.method.schedule import (
    LAST_TIMESTEP,
    acp_from_sigma,
    belongs_to_start,
    check_start_timestep,
    exploding_noise,
)
from .noise_levels import NoiseLevels, check_sigmas

log = logging.getLogger(__name__)

_SEEDS = 2**64 - 1
"""Seeds wrap here: the host adds 1 to them and torch takes 64 bits."""

DrawNoise = Callable[[Tensor, Sequence[int]], Tensor]


def image_seeds(seed: int, latent: Mapping[str, Any]) -> list[int]:
    """The seed of each image of a LATENT: `seed` plus its place in the batch that it was made in.

    Raises:
        SettingsError: the LATENT names places of another number of images than it holds.
    """
    count = len(latent["samples"])
    places = latent.get("batch_index") or range(count)
    if len(places) != count:
        raise SettingsError(
            f"The LATENT holds {count} images but the batch places of {len(places)}; a node before has changed the "
            "batch without its batch_index. Connect the latent of SeeSR Latent Init."
        )
    return [(seed + place) % _SEEDS for place in places]


def image_noise(samples: Tensor, seeds: Sequence[int]) -> Tensor:
    """Standard normal noise of the shape of `samples`, on the CPU: for each image what the host draws for it alone."""
    return torch.cat([comfy.sample.prepare_noise(samples[i : i + 1], seed) for i, seed in enumerate(seeds)])


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageNoise:
    """NOISE for a start from pure noise."""

    seed: int
    """Seed of the first image."""

    def generate_noise(self, latent: Mapping[str, Any]) -> Tensor:
        """Noise of the shape of `latent["samples"]`."""
        return image_noise(latent["samples"], image_seeds(self.seed, latent))


@dataclass(frozen=True, kw_only=True, slots=True)
class LRENoise:
    """NOISE that makes a host sampler start from the LR embedding of the latent that it is given."""

    seed: int
    """Seed of the first image."""
    sigma: float
    """The sampler's first noise level; with another one the start is off."""
    scale: float
    """What the sampler multiplies its noise by, see `NoiseLevels.noise_scale`."""
    acp: float
    """Cumulative alpha of the timestep that the latent is noised to."""
    latent_format: Any
    """The host's, which scales the VAE's latent."""
    draw: DrawNoise = image_noise
    """Draws the standard normal noise of a batch."""

    @classmethod
    def for_model(
        cls,
        model: Any,
        sigmas: Tensor,
        *,
        seed: int,
        start_timestep: int = LAST_TIMESTEP,
        draw: DrawNoise = image_noise,
    ) -> LRENoise:
        """Noise for a sampler of `model` that runs `sigmas`, from the latent noised to `start_timestep`.

        Where sigmas begin too far below the published 999 for that start, the latent is noised to their own first
        level.

        Raises:
            SettingsError: bad sigmas, ones that begin above a `start_timestep` or too far below one other than 999, or
                a model of another kind.
        """
        check_start_timestep(start_timestep)
        check_sigmas(sigmas)
        levels, sigma = NoiseLevels.of(model), float(sigmas[0])
        return cls(
            seed=seed,
            sigma=sigma,
            scale=levels.noise_scale(sigma),
            acp=_start_acp(levels, sigmas, start_timestep),
            latent_format=model.get_model_object("latent_format"),
            draw=draw,
        )

    def generate_noise(self, latent: Mapping[str, Any]) -> Tensor:
        """What the sampler is to take for noise, (B, 4, h, w), of the unscaled `latent["samples"]`."""
        samples = latent["samples"].float()
        normal = self.draw(samples, image_seeds(self.seed, latent))
        z_lr = self.latent_format.process_in(samples.to(normal.device))
        return exploding_noise(z_lr, normal, acp=self.acp, sigma=self.sigma, scale=self.scale)

    def check_start(self, sigmas: Tensor) -> None:
        """Raise SettingsError if the sampler starts at another noise level than this noise was made for."""
        sigma = float(sigmas[0])
        if abs(sigma - self.sigma) > 1e-4 * self.sigma:
            raise SettingsError(
                f"The noise of SeeSR Latent Init was made for sigmas that begin at {self.sigma:.4g}, the sampler's "
                f"begin at {sigma:.4g}; connect the same SIGMAS to both."
            )


def _start_acp(levels: NoiseLevels, sigmas: Tensor, start_timestep: int) -> float:
    """Cumulative alpha that the latent is noised to, see `LRENoise.for_model`."""
    sigma = float(sigmas[0])
    if levels.is_above(sigma, start_timestep):
        raise SettingsError(_too_high(levels, sigma, start_timestep))
    first, second = (levels.timestep(float(level)) for level in sigmas[:2])
    if belongs_to_start(start_timestep, first, second):
        return levels.acp(start_timestep)
    if start_timestep == LAST_TIMESTEP:
        log.info("the SIGMAS begin at timestep %d: the photo's latent is noised to that instead of 999", first)
        return acp_from_sigma(sigma)
    raise SettingsError(
        f"The SIGMAS begin at timestep {first}, far below start_timestep {start_timestep}: the sampler would leave the "
        f"surplus of noise in the picture. Leave start_timestep at {LAST_TIMESTEP}, which follows the SIGMAS, or give "
        "SeeSR Scheduler the same number."
    )


def _too_high(levels: NoiseLevels, sigma: float, start_timestep: int) -> str:
    if levels.has(sigma):
        return (
            f"The SIGMAS begin at timestep {levels.timestep(sigma)}, above start_timestep {start_timestep}: the "
            "sampler would take the photo's detail for noise. Give SeeSR Scheduler the same start_timestep, or leave "
            f"this one at {LAST_TIMESTEP}."
        )
    return (
        f"The SIGMAS begin at noise level {sigma:.4g}, which is none of this MODEL's timesteps (the nearest is "
        f"{levels.timestep(sigma)}; start_timestep is {start_timestep}): they were made for a MODEL with another noise "
        "schedule, as ModelSamplingDiscrete sets it, or by another scheduler. Connect the same MODEL to SeeSR "
        "Scheduler and to SeeSR Latent Init."
    )
