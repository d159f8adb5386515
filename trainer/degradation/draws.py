"""Where the random decisions of the degradation come from.

The degradation asks for them in a fixed order, so another source (a recorded list) can replay a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Draws(Protocol):
    """A source of random decisions; tensors come on the CPU in float32."""

    def uniform(self, low: float, high: float) -> float:
        """One value, evenly from [low, high)."""

    def chance(self, probability: float) -> bool:
        """True with this probability."""

    def choice(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of the options, all equally probable without weights."""

    def uniforms(self, count: int, low: float, high: float) -> Tensor:
        """Values for the images of a batch, (count,), each evenly from [low, high)."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal values."""

    def poisson(self, rate: Tensor) -> Tensor:
        """Poisson counts of the given rates; shape as `rate`."""


class GeneratorDraws:
    """Decisions from one seeded CPU generator: the same seed gives the same degradation on every device."""

    def __init__(self, generator: torch.Generator) -> None:
        """`generator`: on the CPU; every draw advances it."""
        self._generator = generator

    def uniform(self, low: float, high: float) -> float:
        """One value, evenly from [low, high)."""
        return low + (high - low) * torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform(0.0, 1.0) < probability

    def choice(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        """One of the options, all equally probable without weights."""
        cumulative = torch.as_tensor(weights or [1.0] * len(options), dtype=torch.float64).cumsum(0)
        threshold = self.uniform(0.0, cumulative[-1].item())
        return options[int(torch.searchsorted(cumulative, threshold, right=True))]

    def uniforms(self, count: int, low: float, high: float) -> Tensor:
        """Values for the images of a batch, (count,), each evenly from [low, high)."""
        return torch.rand(count, generator=self._generator) * (high - low) + low

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal values."""
        return torch.randn(tuple(shape), generator=self._generator)

    def poisson(self, rate: Tensor) -> Tensor:
        """Poisson counts of the given rates; shape as `rate`."""
        return torch.poisson(rate.cpu(), generator=self._generator)
