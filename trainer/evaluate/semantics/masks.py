"""COCO's average precision of masks, as pycocotools computes it; absent without that package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seesr_core.errors import DataError

from . import coco


def why_absent() -> str:
    """Why masks cannot be judged; empty if they can."""
    return "" if importlib.util.find_spec("pycocotools") else "pycocotools is not installed"


def encode(mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask in COCO's run lengths."""
    from pycocotools import mask

    found: dict[str, Any] = mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return found


def mask_precision(
    path: Path, names: Sequence[str], categories: Mapping[int, str], found: Mapping[str, Iterable[dict[str, Any]]]
) -> dict[str, float]:
    """AP over all thresholds and at 0.50 and 0.75, in percent; nothing where there is nothing to find.

    Args:
        path: COCO "instances" file with masks.
        names: pictures to judge, by file name without suffix.
        categories: those to judge, by id.
        found: by picture: `segmentation` (run lengths), `score`, `category_id`.

    Raises:
        DataError: the file has no masks of that kind.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    file, data = coco.read_file(
        coco.Masks, path, "COCO annotations with masks (segmentation: polygons or run lengths, area)"
    )
    try:
        ids = {image.name: image.id for image in file.images}
        wanted = {ids[name] for name in names}
        truths = [_complete(entry) for entry in data["annotations"] if entry["image_id"] in wanted]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {**data, "annotations": truths}
            truth.createIndex()
            results = [{**own, "image_id": ids[name]} for name in names for own in found[name]]
            if not any(entry["category_id"] in categories and not entry["iscrowd"] for entry in truths):
                return {}
            judge = COCOeval(truth, _results(truth, results), "segm")
            judge.params.imgIds, judge.params.catIds = sorted(wanted), sorted(categories)
            for step in (judge.evaluate, judge.accumulate, judge.summarize):
                step()
    except Exception as error:  # the library raises what it likes
        raise DataError(
            f"{path} should be COCO annotations with masks (segmentation: polygons or run lengths, area), but cannot "
            f"be judged so ({error!r})."
        ) from error
    return {key: 100 * float(value) for key, value in zip(("ap", "ap50", "ap75"), judge.stats, strict=False)}


def _complete(entry: dict[str, Any]) -> dict[str, Any]:
    """With the entries that the library asks for without saying so."""
    return {"iscrowd": 0, **entry, "ignore": 0}


def _results(truth: Any, results: list[dict[str, Any]]) -> Any:
    """The library cannot load an empty list."""
    if results:
        return truth.loadRes(results)
    from pycocotools.coco import COCO

    nothing = COCO()
    nothing.dataset = {**truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing
