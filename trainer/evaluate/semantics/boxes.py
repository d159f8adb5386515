"""COCO's average precision of boxes (101 recalls, IoU 0.50 … 0.95, at most 100 boxes a picture), and its annotations.

Shape letters: D detections, G true boxes, T IoU thresholds. Boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seesr_core.errors import DataError

from . import coco

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

THRESHOLDS: Array = np.linspace(0.5, 0.95, 10)
RECALLS: Array = np.linspace(0.0, 1.0, 101)
MOST = 100


@dataclass(frozen=True, slots=True)
class Truth:
    """The true boxes of one category in one picture."""

    boxes: Array
    """True boxes (G, 4)."""
    crowd: Flags
    """(G,): groups, which boxes may lie in without being right or wrong."""


@dataclass(frozen=True, slots=True)
class Found:
    """The detections of one category in one picture."""

    boxes: Array
    """Detected boxes (D, 4)."""
    scores: Array
    """Scores (D,); the higher, the surer."""


@dataclass(kw_only=True, slots=True)
class Annotations:
    """What a COCO file says."""

    categories: dict[int, str]
    """Names of the categories by id."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Width and height by picture."""
    truths: dict[tuple[str, int], Truth] = field(default_factory=dict)
    """True boxes by picture and category; nothing where there is none."""


class _Matched(NamedTuple):
    """One picture's detections of one category, the surest first."""

    scores: Array
    """Scores of the detections (D,)."""
    right: Flags
    """Whether each detection is right at each threshold (T, D)."""
    ignored: Flags
    """Whether each detection is ignored at each threshold (T, D)."""
    true_boxes: int
    """Number of true boxes that are to be found."""


def read_annotations(path: Path) -> Annotations:
    """Read a COCO "instances" file; pictures go by their file name without suffix.

    Raises:
        DataError: it is no such file.
    """
    data, _ = coco.read_file(
        coco.Instances, path, "COCO annotations (JSON with images, annotations with bbox, categories)"
    )
    names = {image.id: image.name for image in data.images}
    found: dict[tuple[str, int], list[tuple[list[float], bool]]] = {}
    for entry in data.annotations:
        if entry.image_id not in names:
            raise DataError(f"{path} has a box of the picture {entry.image_id}, which it does not list; correct it.")
        left, top, width, height = entry.bbox
        box = [left, top, left + width, top + height]
        found.setdefault((names[entry.image_id], entry.category_id), []).append((box, bool(entry.iscrowd)))
    return Annotations(
        categories={category.id: category.name for category in data.categories},
        sizes={image.name: (image.width, image.height) for image in data.images},
        truths={key: _truth(entries) for key, entries in found.items()},
    )


def _truth(entries: Sequence[tuple[list[float], bool]]) -> Truth:
    boxes, crowd = zip(*entries, strict=True)
    return Truth(np.array(boxes, dtype=np.float64), np.array(crowd, dtype=np.bool_))


def average_precision(truths: Sequence[Truth | None], founds: Sequence[Found]) -> Array | None:
    """AP of one category at every threshold (T,), over pictures; None if there is nothing to find.

    Args:
        truths: each picture's true boxes; None where the category is not there.
        founds: its detections.
    """
    matched = [_match(truth, found) for truth, found in zip(truths, founds, strict=True)]
    to_find = sum(picture.true_boxes for picture in matched)
    if not to_find:
        return None
    order = np.argsort(-np.concatenate([picture.scores for picture in matched]), kind="stable")
    right, ignored = (np.concatenate([part[index] for part in matched], axis=1)[:, order] for index in (1, 2))
    return np.array([_area(hits & ~skip, ~hits & ~skip, to_find) for hits, skip in zip(right, ignored, strict=True)])


def _area(right_D: Flags, wrong_D: Flags, to_find: int) -> float:
    """Precision, made monotonous, at each of the 101 recalls; 0 beyond the last recall that is reached."""
    hits, misses = right_D.cumsum(), wrong_D.cumsum()
    if not len(hits):
        return 0.0
    precision = hits / np.maximum(hits + misses, np.spacing(1.0))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / to_find, RECALLS, side="left")
    return float(np.append(envelope, 0.0)[np.minimum(places, len(envelope))].mean())


def _match(truth: Truth | None, found: Found) -> _Matched:
    """Give every detection, the surest first, the free true box that it overlaps most; crowds take any number."""
    order = np.argsort(-found.scores, kind="stable")[:MOST]
    scores, boxes = found.scores[order], found.boxes[order]
    shape = (len(THRESHOLDS), len(order))
    right, ignored = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    if truth is None:
        return _Matched(scores, right, ignored, 0)
    overlaps = overlap(boxes, truth)
    for level, threshold in enumerate(THRESHOLDS):
        taken = np.zeros(len(truth.boxes), dtype=np.bool_)
        for place, own in enumerate(overlaps):
            best = _best(own, threshold, ~taken & ~truth.crowd)
            if best is not None:
                taken[best] = right[level, place] = True
            else:
                ignored[level, place] = _best(own, threshold, truth.crowd) is not None
    return _Matched(scores, right, ignored, int((~truth.crowd).sum()))


def _best(overlaps_G: Array, threshold: float, allowed_G: Flags) -> int | None:
    """The allowed box of largest overlap, the last of equals, if it reaches the threshold."""
    candidates = np.where(allowed_G, overlaps_G, -1.0)
    if not len(candidates) or candidates.max() < min(threshold, 1 - 1e-10):
        return None
    return int(len(candidates) - 1 - candidates[::-1].argmax())


def overlap(boxes_D4: Array, truth: Truth) -> Array:
    """Intersection over union (D, G); over the detection's own area where the true box is a crowd."""
    low = np.maximum(boxes_D4[:, None, :2], truth.boxes[None, :, :2])
    high = np.minimum(boxes_D4[:, None, 2:], truth.boxes[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    own, other = _areas(boxes_D4)[:, None], _areas(truth.boxes)[None]
    whole = np.where(truth.crowd[None], own, own + other - shared)
    return shared / np.maximum(whole, np.spacing(1.0))


def _areas(boxes: Array) -> Array:
    return (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)


def summary(by_category: Mapping[int, Array | None]) -> dict[str, Any]:
    """Mean AP in percent over categories that are there, over all thresholds and at 0.50 and 0.75."""
    there = [values for values in by_category.values() if values is not None]
    if not there:
        return {}
    table = 100 * np.stack(there)
    return {"ap": float(table.mean()), "ap50": float(table[:, 0].mean()), "ap75": float(table[:, 5].mean())}
