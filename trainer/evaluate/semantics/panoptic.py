"""Panoptic quality (Kirillov et al., CVPR 2019) and mean IoU of class maps, and COCO's panoptic annotations.

Shape letters: H, W pixels, C categories. Maps are integer arrays (H, W); 0 is no segment, VOID no category.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seesr_core.errors import DataError, ImageError
from seesr_core.pictures.opening import open_picture
from seesr_core.runtime.files import inside

from . import coco

Ids = NDArray[np.int64]

VOID = -1
"""Number of a pixel without category in class maps."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A connected or scattered part of a picture that belongs together."""

    category: int
    """Id of the segment's category."""
    crowd: bool = False
    """A group that was not told apart: nothing has to find it, and what lies in it is not wrong."""


@dataclass(frozen=True, slots=True)
class Segmented:
    """A picture cut into segments."""

    ids_HW: Ids
    """Which segment each pixel belongs to; 0 for none."""
    segments: Mapping[int, Segment]
    """Segments by id."""

    def classes(self) -> Ids:
        """The category of each pixel (H, W), VOID where there is none."""
        classes = np.full(self.ids_HW.shape, VOID, dtype=np.int64)
        for number, segment in self.segments.items():
            classes[self.ids_HW == number] = segment.category
        return classes

    def only(self, categories: Mapping[int, str]) -> Segmented:
        """The same without the segments of other categories, whose pixels belong to none."""
        return Segmented(self.ids_HW, {n: own for n, own in self.segments.items() if own.category in categories})


@dataclass(kw_only=True, slots=True)
class PanopticAnnotations:
    """What a COCO panoptic file says; the masks are read when they are asked for."""

    categories: dict[int, str]
    """Names of the categories by id."""
    stuff: set[int]
    """Categories without instances, such as sky."""
    files: dict[str, Path] = field(default_factory=dict)
    """PNG of segment numbers by picture."""
    segments: dict[str, dict[int, Segment]] = field(default_factory=dict)
    """Segments by picture and number."""

    def read(self, name: str) -> Segmented:
        """The truth of one picture.

        Raises:
            DataError: its PNG is missing or no colour picture.
        """
        path = self.files[name]
        try:
            with open_picture(path) as picture:
                rgb = np.asarray(picture.convert("RGB"), dtype=np.int64)
        except ImageError as error:
            raise DataError(f"{path} should hold the segments of {name} as a PNG ({error}).") from error
        return Segmented(rgb @ np.array([1, 256, 256**2]), self.segments[name])


def read_panoptic(path: Path, masks: Path | None = None) -> PanopticAnnotations:
    """Read a COCO panoptic file; pictures go by their file name without suffix.

    Args:
        path: JSON with annotations (segments_info) and categories.
        masks: folder of its PNG files; by default the one beside it of the same name, as COCO ships them.

    Raises:
        DataError: it is no such file, or the folder is missing.
    """
    folder = masks or path.with_suffix("")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; the PNG files of {path} are expected there (or --panoptic-masks).")
    data, _ = coco.read_file(
        coco.Panoptic,
        path,
        "COCO panoptic annotations (JSON with annotations with segments_info, categories with isthing)",
    )
    found = PanopticAnnotations(
        categories={category.id: category.name for category in data.categories},
        stuff={category.id for category in data.categories if not category.isthing},
    )
    for entry in data.annotations:
        try:
            mask = inside(folder, entry.file_name)
        except ValueError as error:
            raise DataError(f"{path}: {error}; correct its file_name.") from error
        found.files[mask.stem] = mask
        found.segments[mask.stem] = {
            part.id: Segment(part.category_id, bool(part.iscrowd)) for part in entry.segments_info
        }
    return found


@dataclass(slots=True)
class Tally:
    """What became of the segments of one category."""

    overlap: float = 0.0
    """Sum of the IoU of matched segments."""
    right: int = 0
    """Number of segments that were matched."""
    wrong: int = 0
    """Number of segments that were found where there is none."""
    missed: int = 0
    """Number of segments that are there but were not found."""

    @property
    def quality(self) -> float | None:
        """Panoptic quality, 0 … 1; None where the category is neither there nor found."""
        counted = self.right + 0.5 * self.wrong + 0.5 * self.missed
        return self.overlap / counted if counted else None


@dataclass(slots=True)
class PanopticQuality:
    """Panoptic quality over pictures; segments match above an IoU of one half, so at most one to one.

    Not torchmetrics' (1.9): it knows no groups, and forgives pixels that no segment was found for, where COCO counts
    them: three of four pixels found, the fourth left out, are 100 there and 75 here. Both agree on the rest.
    """

    tallies: dict[int, Tally] = field(default_factory=dict)
    """Tallies by category."""

    def add(self, truth: Segmented, found: Segmented) -> None:
        """Count one picture."""
        shared, true_areas, areas = _overlaps(truth, found)
        matched: set[int] = set()
        for number, segment in truth.segments.items():
            if segment.crowd:
                continue
            match = self._match(number, truth, found, shared, true_areas, areas)
            if match is None:
                self._of(segment.category).missed += 1
            else:
                matched.add(match)
        for number, segment in found.segments.items():
            fresh = number not in matched and areas[number]
            if fresh and not _excused(number, segment, truth, shared, areas[number]):
                self._of(segment.category).wrong += 1

    def _match(
        self,
        number: int,
        truth: Segmented,
        found: Segmented,
        shared: Mapping[tuple[int, int], int],
        true_areas: Mapping[int, int],
        areas: Mapping[int, int],
    ) -> int | None:
        """The found segment of the same category and an IoU above one half; pixels of no true segment do not count."""
        category = truth.segments[number].category
        for candidate, segment in found.segments.items():
            common = shared.get((number, candidate), 0)
            if segment.category != category or not common:
                continue
            iou = common / (true_areas[number] + areas[candidate] - common - shared.get((0, candidate), 0))
            if iou > 0.5:
                tally = self._of(category)
                tally.right, tally.overlap = tally.right + 1, tally.overlap + iou
                return candidate
        return None

    def _of(self, category: int) -> Tally:
        return self.tallies.setdefault(category, Tally())

    def result(self) -> float | None:
        """Mean over the categories that are there or were found, in percent; None without any."""
        return _mean_percent(tally.quality for tally in self.tallies.values())


def _overlaps(truth: Segmented, found: Segmented) -> tuple[Counter[tuple[int, int]], Counter[int], Counter[int]]:
    """Pixels that a true and a found segment share, and of each alone; pixels of no known segment count as number 0."""
    known, own = (_known(part) for part in (truth, found))
    pairs, counts = np.unique(np.stack([known.ravel(), own.ravel()]), axis=1, return_counts=True)
    shared: Counter[tuple[int, int]] = Counter()
    true_areas: Counter[int] = Counter()
    areas: Counter[int] = Counter()
    for (a, b), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        shared[a, b] += count
        true_areas[a] += count
        areas[b] += count
    return shared, true_areas, areas


def _known(part: Segmented) -> Ids:
    return np.where(np.isin(part.ids_HW, list(part.segments)), part.ids_HW, 0)


def _excused(number: int, segment: Segment, truth: Segmented, shared: Mapping[tuple[int, int], int], area: int) -> bool:
    """Whether more than half of a found segment lies on nothing or in groups of its category."""
    crowds = (n for n, own in truth.segments.items() if own.crowd and own.category == segment.category)
    return sum(shared.get((n, number), 0) for n in (0, *crowds)) > area / 2


@dataclass(slots=True)
class MeanIoU:
    """Intersection over union of class maps, the mean over categories that are somewhere in the truth."""

    right: Counter[int] = field(default_factory=Counter)
    """Pixels by category that result and truth agree on."""
    there: Counter[int] = field(default_factory=Counter)
    """Pixels by category that the truth has."""
    said: Counter[int] = field(default_factory=Counter)
    """That were found, where the truth says anything."""

    def add(self, truth_HW: Ids, found_HW: Ids) -> None:
        """Count one picture."""
        judged = truth_HW != VOID
        truth, found = truth_HW[judged], found_HW[judged]
        for counter, values in ((self.right, truth[truth == found]), (self.there, truth), (self.said, found)):
            counter.update(dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True)))

    def result(self) -> float | None:
        """The figures in percent; None where the truth says nothing."""
        return _mean_percent(
            self.right[category] / (count + self.said[category] - self.right[category])
            for category, count in self.there.items()
        )


def _mean_percent(values: Iterator[float | None]) -> float | None:
    there: Sequence[float] = [value for value in values if value is not None]
    return 100 * sum(there) / len(there) if there else None
