"""Average precision by hand, and the bootstrap."""

from __future__ import annotations

import pytest
import torch

from trainer.evaluate.report.intervals import Estimate, mean_estimate, resamples
from trainer.evaluate.semantics.ranking import average_precision, map_over_photos, map_over_tags


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 / 1 + 2 / 3) / 2),
        ([0.1, 0.2, 0.3], [0, 0, 1], 1.0),
        ([0.3, 0.2, 0.1], [0, 0, 1], 1 / 3),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 1 / 4),
        ([0.9, 0.5, 0.5, 0.1], [0, 1, 1, 1], (2 / 3 + 2 / 3 + 3 / 4) / 3),
    ],
)
def test_average_precision_by_hand(scores: list[float], positive: list[int], expected: float) -> None:
    found = average_precision(torch.tensor(scores), torch.tensor(positive, dtype=torch.bool))
    assert found.item() == pytest.approx(expected)


def test_no_positive_is_no_number() -> None:
    assert average_precision(torch.rand(3), torch.zeros(3, dtype=torch.bool)).isnan().all()


def test_weights_are_repetitions() -> None:
    g = torch.Generator().manual_seed(0)
    scores, positive = torch.rand(20, generator=g), torch.rand(20, generator=g) < 0.4
    weights = resamples(20, 5, g)
    found = average_precision(scores, positive, weights)
    for row, value in zip(weights.long(), found, strict=True):
        repeated = average_precision(scores.repeat_interleave(row), positive.repeat_interleave(row))
        assert value.item() == pytest.approx(repeated.item())


def test_means_leave_out_tags_and_photos_without_positives() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.5]])
    positive = torch.tensor([[True, True, False], [False, False, False]])
    assert map_over_tags(scores, positive).item() == pytest.approx((1.0 + 0.5) / 2)
    assert map_over_photos(scores, positive).item() == pytest.approx((1.0 + 2 / 3) / 2)


def test_resamples_draw_as_many_as_there_are() -> None:
    weights = resamples(30, 200, torch.Generator().manual_seed(1))
    assert (weights.sum(1) == 30).all()
    assert weights.std(0).min() > 0.5


def test_intervals_hold_the_value_and_shrink_with_more_photos() -> None:
    g = torch.Generator().manual_seed(2)
    few, many = (mean_estimate(torch.randn(n, generator=g), resamples(n, 500, g)) for n in (20, 2000))
    for estimate in (few, many):
        assert estimate.low < estimate.value < estimate.high
    assert few.high - few.low > 5 * (many.high - many.low)
    assert many.high - many.low == pytest.approx(2 * 1.96 / 2000**0.5, rel=0.2)


def test_interval_is_centred_on_the_value_even_if_resampling_is_biased() -> None:
    resampled = torch.linspace(4.0, 6.0, 1001, dtype=torch.float64)
    assert Estimate.of(torch.tensor(3.0), resampled) == pytest.approx((3.0, 2.05, 3.95))
    assert Estimate(0.1234, -0.1, 0.3).text(2, signed=True) == "+0.12 [-0.10, +0.30]"


def test_interval_stays_within_what_the_figure_can_be() -> None:
    resampled = torch.linspace(90.0, 99.0, 1001, dtype=torch.float64)
    assert Estimate.of(torch.tensor(99.0), resampled).high > 103
    estimate = Estimate.of(torch.tensor(99.0), resampled, least=0.0, most=100.0)
    assert (estimate.value, estimate.high) == (99.0, 100.0)
    assert estimate.low == pytest.approx(99 - 4.275)
    values = torch.tensor([1.0, 1.0, 1.0, 0.0])
    shares = mean_estimate(values, resamples(4, 200, torch.Generator().manual_seed(0)))
    assert 0.0 <= shares.low < 0.75 < shares.high <= 1.0
