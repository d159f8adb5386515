"""How well scores rank: average precision, and bootstrap intervals by weighting.

Shape letters: N photos, T tags, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def average_precision(scores_N: Tensor, positive_N: Tensor, weights_RN: Tensor | None = None) -> Tensor:
    """Σ (recall gained) · precision down the ranking, with equal scores taken as one step; float64 (R,).

    Equal scores for all give the share of positives. NaN without any positive.

    Args:
        scores_N: the higher, the surer.
        positive_N: what should rank high, boolean.
        weights_RN: how often each entry counts, one row a resample; by default once each (R = 1).
    """
    order = scores_N.argsort(descending=True)
    ranked = scores_N[order]
    weights = torch.ones(1, len(order)) if weights_RN is None else weights_RN[:, order]
    weights = weights.double()
    hits = weights * positive_N[order]
    last_of_equals = torch.searchsorted(-ranked, -ranked, right=True) - 1
    precision = hits.cumsum(1)[:, last_of_equals] / weights.cumsum(1)[:, last_of_equals].clamp_min(1e-12)
    return (hits * precision).sum(1) / hits.sum(1)


def map_over_tags(scores_NT: Tensor, positive_NT: Tensor, weights_RN: Tensor | None = None) -> Tensor:
    """Mean of the tags' average precisions, each ranking the photos; (R,). Tags without a positive do not count."""
    columns = zip(scores_NT.T, positive_NT.T, strict=True)
    return torch.stack([average_precision(scores, positive, weights_RN) for scores, positive in columns]).nanmean(0)


def map_over_photos(scores_NT: Tensor, positive_NT: Tensor, weights_RN: Tensor | None = None) -> Tensor:
    """Mean of the photos' average precisions, each ranking the tags; (R,). Photos without a positive do not count."""
    rows = zip(scores_NT, positive_NT, strict=True)
    each_N = torch.cat([average_precision(scores, positive) for scores, positive in rows])
    weights = torch.ones(1, len(each_N)) if weights_RN is None else weights_RN
    weights = weights.double() * ~each_N.isnan()
    return (weights * each_N.nan_to_num()).sum(1) / weights.sum(1)


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
    def of(cls, value: Tensor, resampled_R: Tensor) -> Estimate:
        """Interval from the figure on all photos and on the resamples (NaN resamples are passed over).

        The interval is that of the resamples' deviations from their own mean: a photo drawn twice raises the average
        precision of a rare tag, so the resamples as a whole lie too high.
        """
        deviations = resampled_R - resampled_R.nanmean()
        low, high = torch.nanquantile(deviations, torch.tensor([0.025, 0.975], dtype=deviations.dtype)).tolist()
        return cls(float(value), float(value) + low, float(value) + high)

    def text(self, digits: int = 3, *, signed: bool = False) -> str:
        """The figure as tables show it: value [low, high]."""
        sign = "+" if signed else ""
        return f"{self.value:{sign}.{digits}f} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


def mean_estimate(values_N: Tensor, weights_RN: Tensor) -> Estimate:
    """The mean of `values` (N,), such as paired differences."""
    values = values_N.double()
    weights = weights_RN.double()
    return Estimate.of(values.mean(), weights @ values / weights.sum(1))
