"""COCO's average precision by hand, and against figures of COCO's own code (pycocotools 2.0.11) on boxes by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seesr_core.errors import DataError
from trainer.evaluate.semantics.boxes import Found, Truth, average_precision, overlap, read_annotations, summary

CATEGORIES = {3: "cat", 7: "dog", 9: "tree"}


def truth(*boxes: list[float], crowd: tuple[bool, ...] = ()) -> Truth:
    return Truth(np.array(boxes, dtype=float), np.array(crowd or (False,) * len(boxes)))


def found(*scored: tuple[float, list[float]]) -> Found:
    return Found(np.array([box for _, box in scored], dtype=float).reshape(-1, 4), np.array([s for s, _ in scored]))


def boxes_by_rule() -> tuple[dict, list[dict]]:
    """COCO annotations and results of 8 pictures: jittered boxes, doubles, strays, crowds, equal scores."""
    rng = np.random.Generator(np.random.PCG64(5))
    images = [{"id": i, "file_name": f"p{i}.jpg", "width": 200, "height": 150} for i in range(8)]
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number in range(60):
        image, category = int(rng.integers(8)), int(rng.choice(list(CATEGORIES)))
        box = [*rng.uniform(0, 100, 2), *rng.uniform(10, 50, 2)]
        crowd = int(rng.random() < 0.15)
        annotations.append(
            {"id": number + 1, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            | {"area": box[2] * box[3]}
        )
        for _ in range(int(rng.integers(0, 3))):
            near = (np.array(box) + rng.normal(0, 3, 4)).clip(1).tolist()
            score = round(float(rng.random()), 1)
            results.append({"image_id": image, "category_id": category, "bbox": near, "score": score})
    for _ in range(20):
        stray = [*rng.uniform(0, 100, 2), *rng.uniform(10, 50, 2)]
        place = {"image_id": int(rng.integers(8)), "category_id": int(rng.choice(list(CATEGORIES)))}
        results.append({**place, "bbox": stray, "score": float(rng.random())})
    categories = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def test_equal_to_cocos_own_code(tmp_path: Path) -> None:
    data, results = boxes_by_rule()
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data), "utf-8")
    annotations = read_annotations(path)
    assert annotations.sizes["p3"] == (200, 150)
    by_category = {}
    for key in annotations.categories:
        founds = []
        for image in data["images"]:
            own = [r for r in results if r["image_id"] == image["id"] and r["category_id"] == key]
            corners = [[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in own)]
            founds.append(found(*zip([r["score"] for r in own], corners, strict=True)))
        by_category[key] = average_precision([annotations.truths.get((f"p{i}", key)) for i in range(8)], founds)
    assert summary(by_category) == pytest.approx(COCO, abs=1e-9)


COCO = {"ap": 17.542080508417143, "ap50": 39.672602180853005, "ap75": 8.72063676955931}
"""pycocotools 2.0.11, COCOeval "bbox", on `boxes_by_rule`."""


def test_by_hand() -> None:
    box, other = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]
    right, stray = found((0.9, box)), found((0.9, other), (0.8, box))
    assert average_precision([truth(box)], [right]) == pytest.approx(np.ones(10))
    assert average_precision([truth(box)], [stray]) == pytest.approx(np.full(10, 0.5))
    half = average_precision([truth(box), truth(other)], [right, found()])
    assert half == pytest.approx(np.full(10, 51 / 101)), "recall reaches one half"
    narrow = average_precision([truth(box)], [found((0.9, [0, 0, 10, 7]))])
    assert narrow == pytest.approx([1.0] * 5 + [0.0] * 5), "an overlap of 0.7 counts up to 0.70"


def test_a_box_is_found_once_and_crowds_neither_help_nor_hurt() -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    doubled = average_precision([truth(box), truth(box)], [found((0.9, box), (0.8, box)), found((0.7, box))])
    assert doubled == pytest.approx(np.full(10, (51 + 50 * 2 / 3) / 101))
    crowd = truth(box, [20, 0, 60, 40], crowd=(False, True))
    inside = found((0.9, [25, 5, 35, 15]), (0.8, box), (0.7, [40, 5, 50, 15]))
    assert average_precision([crowd], [inside]) == pytest.approx(np.ones(10))
    assert average_precision([None], [found((0.5, box))]) is None
    assert summary({1: None}) == {}


def test_overlap() -> None:
    pair = truth([0, 0, 10, 10], [0, 0, 100, 100], crowd=(False, True))
    assert overlap(np.array([[5.0, 0, 15, 10]]), pair)[0] == pytest.approx([50 / 150, 1.0])


@pytest.mark.parametrize("text", ["no json", "[]", '{"images": [{"id": 1}], "annotations": [], "categories": []}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match="should be COCO annotations"):
        read_annotations(path)
