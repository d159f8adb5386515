"""What the proof in small counts, and its figures with intervals over scenes and trainings.

Shape letters: N scenes, S trainings, R resamples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seesr_core.errors import DataError
from seesr_core.formats.schema import MOST_BYTES, MalformedError, Number, Whole, parse_json, read
from seesr_core.runtime.files import read_text
from seesr_core.segsr.labels import VOID

from ..data.order import Stream, seeded
from ..evaluate.report.intervals import Estimate, resamples

MIOU = "miou"
_RANGES: Mapping[str, tuple[float, float]] = {MIOU: (0.0, 100.0)}
Sampled = tuple[Tensor, Tensor]
"""A figure, and that figure on every resample (R,)."""


@dataclass(slots=True)
class Row:
    """What gathers for one way of doing it by one training."""

    right: list[Tensor] = field(default_factory=list)
    """Pixels of each class that were found, a scene a row (K,)."""
    either: list[Tensor] = field(default_factory=list)
    """Pixels of each class in truth or answer."""
    figures: dict[str, list[float]] = field(default_factory=dict)
    """Figures of the pictures, by name, one a scene."""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        counts = {name: torch.stack(getattr(self, name)).long().tolist() for name in ("right", "either")}
        return {**counts, "figures": self.figures}

    @classmethod
    def of(cls, kept: _Kept) -> Row:
        """What `plain` wrote."""
        right, either = ([torch.tensor(scene).double() for scene in scenes] for scenes in (kept.right, kept.either))
        return cls(right, either, dict(kept.figures))

    def add_labels(self, found: Tensor, true: Tensor, classes: int) -> None:
        """Count one scene; void does not count."""
        known = true != VOID
        pairs = torch.bincount(true[known] * classes + found[known], minlength=classes**2).view(classes, classes)
        self.right.append(pairs.diagonal().double())
        self.either.append((pairs.sum(0) + pairs.sum(1) - pairs.diagonal()).double())


@dataclass(frozen=True, slots=True)
class _Kept:
    """A row in a report."""

    right: list[list[Whole]]
    either: list[list[Whole]]
    figures: dict[str, list[Number]]


@dataclass(frozen=True, slots=True)
class _Report:
    """A report, as far as its rows are taken over."""

    measured: str
    counts: dict[str, dict[str, _Kept]]


Rows = dict[str, dict[str, Row]]
"""Rows by name and by the hash of the training's file."""


def read_rows(report: Path, measured: str) -> Rows:
    """The rows of an earlier report; none of one that `measured` otherwise.

    Raises:
        DataError: it is no report.
    """
    try:
        found = read(_Report, parse_json(read_text(report, MOST_BYTES)))
    except (OSError, MalformedError) as error:
        raise DataError(f"{report} should be a report of this command ({error}).") from error
    if found.measured != measured:
        return {}
    return {name: {key: Row.of(kept) for key, kept in rows.items()} for name, rows in found.counts.items()}


@dataclass(frozen=True, slots=True)
class Drawn:
    """Bootstrap resamples of scenes and, apart from them, of trainings."""

    scenes_RN: Tensor
    """How often each scene comes."""
    trainings_RS: Tensor
    """How often each training comes."""

    @classmethod
    def of(cls, scenes: int, trainings: int, times: int) -> Drawn:
        """So many draws of both."""
        counts = ((scenes, Stream.SEGSR_INTERVAL), (trainings, Stream.SEGSR_TRAININGS))
        return cls(*(resamples(count, times, seeded(stream)).double() for count, stream in counts))

    def over(self, one_S: Tensor, resampled_RS: Tensor) -> Sampled:
        """The mean over trainings of a figure that every training has on all scenes and on every resample of them."""
        weights = self.trainings_RS
        return one_S.mean(), (weights * resampled_RS).sum(1) / weights.sum(1)


def miou(rows: Sequence[Row], drawn: Drawn) -> Sampled:
    """Mean IoU in percent over the classes that are there, of a row for each training."""
    right, either = (torch.stack([torch.stack(getattr(row, name)) for row in rows]) for name in ("right", "either"))
    one = _mean_iou(right.sum(1), either.sum(1))
    resampled = (torch.einsum("rn,snk->rsk", drawn.scenes_RN, pixels) for pixels in (right, either))
    return drawn.over(one, _mean_iou(*resampled))


def _mean_iou(right: Tensor, either: Tensor) -> Tensor:
    return 100 * torch.where(either > 0, right / either, torch.nan).nanmean(-1)


def mean(rows: Sequence[Row], key: str, drawn: Drawn) -> Sampled:
    """Mean of a figure of the pictures, of a row for each training."""
    values_SN = torch.tensor([row.figures[key] for row in rows]).double()
    resampled = drawn.scenes_RN @ values_SN.T / drawn.scenes_RN.sum(1, keepdim=True)
    return drawn.over(values_SN.mean(1), resampled)


def sampled(rows: Sequence[Row], drawn: Drawn) -> dict[str, Sampled]:
    """All figures of a way, by name."""
    return {MIOU: miou(rows, drawn), **{key: mean(rows, key, drawn) for key in rows[0].figures}}


def estimates(figures: Mapping[str, Sampled]) -> dict[str, Estimate]:
    """With their intervals."""
    found = {}
    for key, figure in figures.items():
        least, most = _RANGES.get(key, (-torch.inf, torch.inf))
        found[key] = Estimate.of(*figure, least=least, most=most)
    return found


def differences(one: Mapping[str, Sampled], other: Mapping[str, Sampled]) -> dict[str, Estimate]:
    """One way less another, on the same resamples, of what both have."""
    shared = (key for key in one if key in other)
    return {key: Estimate.of(*(a - b for a, b in zip(one[key], other[key], strict=True))) for key in shared}
