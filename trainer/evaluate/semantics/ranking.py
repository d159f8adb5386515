"""How well scores rank: average precision, of entries that may be weighted for a bootstrap.

Shape letters: N photos, T tags, R resamples.
"""

from __future__ import annotations

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
