"""A host model's noise schedule in the terms of the method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...seesr_core.errors import SettingsError
from ...seesr_core.method.schedule import LAST_TIMESTEP, acp_from_sigma
from ..schema import require_finite

_SAME_LEVEL = 1e-5
"""Relative difference below which the host takes a sigma for its largest."""


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """Noise levels of timesteps 0 … 999, in the host's variance-exploding form."""

    sampling: Any
    """The model's `model_sampling`."""

    @classmethod
    def of(cls, model: Any) -> NoiseLevels:
        """The levels of a MODEL.

        Raises:
            SettingsError: its noise does not follow 1000 timesteps of a diffusion, as Stable Diffusion's does.
        """
        sampling = model.get_model_object("model_sampling")
        levels = cls(sampling)
        if not levels._is_discrete_diffusion():
            raise SettingsError(
                f"Expected a Stable Diffusion MODEL (1.x, 2.x, XL) with noise levels for 1000 timesteps, found "
                f"{type(model.model).__name__} with another kind of noise schedule; connect SD-2-base or SD-turbo."
            )
        return levels

    def _is_discrete_diffusion(self) -> bool:
        kinds = (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS)
        if not all(isinstance(self.sampling, kind) for kind in kinds):
            return False
        return math.isclose(self.sigma(LAST_TIMESTEP), self.largest, rel_tol=_SAME_LEVEL)

    @property
    def largest(self) -> float:
        """Sigma of the last training timestep."""
        return float(self.sampling.sigma_max)

    def sigma(self, t: int) -> float:
        """Noise level of a timestep; the host's samplers turn it back into exactly `t`."""
        return float(self.sampling.sigma(torch.tensor(float(t))))

    def acp(self, t: int) -> float:
        """Cumulative alpha of a timestep."""
        return acp_from_sigma(self.sigma(t))

    def noise_scale(self, sigma: float) -> float:
        """What the host's samplers multiply their noise by if they start at `sigma`.

        At the largest level they take the start for pure noise and scale its variance to 1 + sigma².
        """
        starts_from_noise = sigma > self.largest or math.isclose(sigma, self.largest, rel_tol=_SAME_LEVEL)
        return math.sqrt(1.0 + sigma**2) if starts_from_noise else sigma

    def is_above(self, sigma: float, t: int) -> bool:
        """Whether `sigma` is a higher level than that of timestep `t`."""
        return sigma > self.sigma(t) * (1.0 + _SAME_LEVEL)

    def has(self, sigma: float) -> bool:
        """Whether `sigma` is the level of a whole timestep."""
        return math.isclose(sigma, self.sigma(self.timestep(sigma)), rel_tol=_SAME_LEVEL)

    def timestep(self, sigma: float) -> int:
        """The timestep whose level is nearest."""
        return int(self.sampling.timestep(torch.tensor([sigma])))


def check_sigmas(sigmas: Tensor) -> None:
    """Raise SettingsError unless `sigmas` are at least two levels that fall."""
    values = sigmas.flatten().tolist()
    if len(values) < 2:
        raise SettingsError(
            f"Expected SIGMAS of at least one step (two noise levels), found {len(values)}; connect SeeSR Scheduler "
            "with at least one step."
        )
    require_finite(sigmas, "SIGMAS", "connect SeeSR Scheduler")
    if any(later > earlier for earlier, later in pairwise(values)) or values[0] <= 0.0:
        raise SettingsError(
            f"Expected SIGMAS that fall from a positive noise level, found {_text(values)}; connect SeeSR Scheduler, "
            "not flipped or joined levels."
        )


def _text(values: list[float]) -> str:
    shown = [f"{value:.4g}" for value in values]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "…", *shown[-2:]])
