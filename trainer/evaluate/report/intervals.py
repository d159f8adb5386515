"""Bootstrap intervals by weighting. Shape letters: N photos, R resamples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def resamples(count: int, times: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` photos comes in each of `times` bootstrap resamples, float32 (times, count)."""
    drawn = torch.randint(count, (times, count), generator=generator)
    return torch.zeros(times, count).scatter_add_(1, drawn, torch.ones(times, count))


class Estimate(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    value: float
    """The figure on all photos."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    @classmethod
    def of(cls, value: Tensor, resampled_R: Tensor, *, least: float = -math.inf, most: float = math.inf) -> Estimate:
        """Interval from the figure on all photos and on the resamples (NaN resamples are passed over).

        The interval is that of the resamples' deviations from their own mean: a photo drawn twice raises the average
        precision of a rare tag, so the resamples as a whole lie too high. So shifted, an end may leave the
        range that the figure has; it is cut there.

        Args:
            value: the figure on all photos.
            resampled_R: the figure on every resample.
            least: lowest value that the figure can have.
            most: highest value that the figure can have.
        """
        deviations = resampled_R - resampled_R.nanmean()
        low, high = torch.nanquantile(deviations, torch.tensor([0.025, 0.975], dtype=deviations.dtype)).tolist()
        return cls(float(value), max(float(value) + low, least), min(float(value) + high, most))

    def text(self, digits: int = 3, *, signed: bool = False) -> str:
        """The figure as tables show it: value [low, high]."""
        sign = "+" if signed else ""
        return f"{self.value:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def mean_estimate(values_N: Tensor, weights_RN: Tensor) -> Estimate:
    """The mean of `values` (N,), such as paired differences; its interval stays within their range."""
    values = values_N.double()
    weights = weights_RN.double()
    least, most = values.min().item(), values.max().item()
    return Estimate.of(values.mean(), weights @ values / weights.sum(1), least=least, most=most)
