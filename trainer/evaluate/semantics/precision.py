"""COCO's average precision of boxes and masks, as pycocotools computes it; absent without that package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seesr_core.errors import DataError

from . import coco

Kind = Literal["bbox", "segm"]
"""What is judged, boxes or masks, in pycocotools' words."""
_FILES: Mapping[Kind, tuple[type[coco.Instances] | type[coco.Masks], str]] = {
    "bbox": (coco.Instances, coco.BOXES),
    "segm": (coco.Masks, "COCO annotations with masks (segmentation: polygons or run lengths, area)"),
}


def why_absent() -> str:
    """Why average precision cannot be computed; empty if it can."""
    return "" if importlib.util.find_spec("pycocotools") else "pycocotools is not installed"


def encode(mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask in COCO's run lengths."""
    from pycocotools import mask

    found: dict[str, Any] = mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Truths:
    """A COCO "instances" file to judge by; pictures go by their file name without suffix."""

    kind: Kind
    """Whether its boxes or its masks count."""
    path: Path
    """The file."""
    categories: dict[int, str]
    """Names of the categories by id."""
    pictures: dict[str, coco.Picture]
    """The annotated pictures by name."""
    data: dict[str, Any]
    """The file's JSON."""

    @classmethod
    def read(cls, kind: Kind, path: Path) -> Truths:
        """Read the file.

        Raises:
            DataError: it is no such file, or has no masks where these are asked for.
        """
        file, data = coco.read_objects(*_FILES[kind], path)
        return cls(
            kind=kind,
            path=path,
            categories={category.id: category.name for category in file.categories},
            pictures={image.name: image for image in file.images},
            data=data,
        )

    def precision(
        self, names: Sequence[str], categories: Iterable[int], found: Mapping[str, Iterable[dict[str, Any]]]
    ) -> dict[str, float]:
        """AP over all thresholds and at 0.50 and 0.75, in percent; nothing where there is nothing to find.

        Args:
            names: pictures to judge.
            categories: those to judge, by id.
            found: by picture: `bbox` (left, top, width, height) or `segmentation` (run lengths), `score`,
                `category_id`.

        Raises:
            DataError: the annotations cannot be judged.
        """
        ids, judged = {name: self.pictures[name].id for name in names}, sorted(categories)
        wanted = set(ids.values())
        truths = [entry for entry in self.data["annotations"] if entry["image_id"] in wanted]
        if not any(entry["category_id"] in judged and not entry.get("iscrowd") for entry in truths):
            return {}
        results = [{**own, "image_id": ids[name]} for name in names for own in found[name]]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                stats = _judge(self.kind, {**self.data, "annotations": _complete(truths)}, results, wanted, judged)
        except Exception as error:  # the library raises what it likes
            raise DataError(
                f"{self.path} should be {_FILES[self.kind][1]}, but cannot be judged so ({error!r})."
            ) from error
        return {key: 100 * float(value) for key, value in zip(("ap", "ap50", "ap75"), stats, strict=False)}


def _judge(
    kind: Kind, data: dict[str, Any], results: list[dict[str, Any]], images: Iterable[int], categories: list[int]
) -> Sequence[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, nothing = COCO(), COCO()
    for indexed, content in ((truth, data), (nothing, {**data, "annotations": []})):
        indexed.dataset = content
        indexed.createIndex()
    # The library cannot load an empty list.
    judge = COCOeval(truth, truth.loadRes(results) if results else nothing, kind)
    judge.params.imgIds, judge.params.catIds = sorted(images), categories
    for step in (judge.evaluate, judge.accumulate, judge.summarize):
        step()
    stats: Sequence[float] = judge.stats
    return stats


def _complete(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """With what the library asks for without saying so: it takes an id of 0 for no match, and the area for granted."""
    return [
        {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3] if "bbox" in entry else 0, **entry}
        | {"id": number, "ignore": 0}
        for number, entry in enumerate(entries, start=1)
    ]
