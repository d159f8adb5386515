"""Average precision of boxes by hand and by rule, as it is asked of pycocotools; reading COCO's boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from seesr_core.errors import DataError
from trainer.evaluate.semantics.boxes import read_annotations
from trainer.evaluate.semantics.precision import Truths, why_absent

Corners: TypeAlias = tuple[float, ...]
needs_coco = pytest.mark.skipif(bool(why_absent()), reason=why_absent())
CATEGORIES = {3: "cat", 7: "dog", 9: "tree"}


def judged(path: Path, data: dict, results: list[dict]) -> dict[str, float]:
    """AP of results that are written as COCO does."""
    path.write_text(json.dumps(data), "utf-8")
    truths = Truths.read("bbox", path)
    assert {picture.size for picture in truths.pictures.values()} == {(200, 150)}
    by_picture: dict[str, list[dict]] = {name: [] for name in truths.pictures}
    for result in results:
        by_picture[f"p{result['image_id']}"].append(result)
    return truths.precision(list(by_picture), truths.categories, by_picture)


def by_corners(path: Path, truths: list[list[Corners]], founds: list[list[tuple[float, Corners]]]) -> dict[str, float]:
    """AP of one category: true and found boxes of each picture by their corners, a fifth number marks a crowd."""
    true = [entry(i, box) | {"iscrowd": int(len(box) > 4)} for i, own in enumerate(truths) for box in own]
    found = [entry(i, box) | {"score": score} for i, own in enumerate(founds) for score, box in own]
    images = [{"id": i, "file_name": f"p{i}.jpg", "width": 200, "height": 150} for i in range(len(truths))]
    return judged(path, {"images": images, "annotations": true, "categories": [{"id": 3, "name": "cat"}]}, found)


def entry(picture: int, box: Corners) -> dict[str, Any]:
    sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return {"image_id": picture, "category_id": 3, "bbox": sides}


def figures(ap: float, ap50: float, ap75: float) -> Any:
    return pytest.approx({"ap": ap, "ap50": ap50, "ap75": ap75}, abs=1e-9)


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


@needs_coco
def test_boxes_by_rule(tmp_path: Path) -> None:
    """The figures that the package gave when they were written down, which a computation of our own gave, too."""
    assert judged(tmp_path / "x.json", *boxes_by_rule()) == figures(*COCO)


COCO = (17.542080508417143, 39.672602180853005, 8.72063676955931)
"""AP, AP50 and AP75 by pycocotools 2.0.11 of `boxes_by_rule`."""


@needs_coco
@pytest.mark.parametrize("numbers", ["from 0", "all alike", "none"])
def test_ids_of_annotations_have_no_part_in_it(tmp_path: Path, numbers: str) -> None:
    """The package would take a match with id 0 for none, and lose all but one of an id."""
    data, results = boxes_by_rule()
    for annotation in data["annotations"]:
        number, _ = annotation.pop("id"), annotation.pop("area")
        if numbers != "none":
            annotation["id"] = number - 1 if numbers == "from 0" else 1
    assert judged(tmp_path / "x.json", data, results) == figures(*COCO)


BOX, OTHER = (0.0, 0.0, 10.0, 10.0), (50.0, 50.0, 60.0, 60.0)


@needs_coco
def test_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert by_corners(path, [[BOX]], [[(0.9, BOX)]]) == figures(100, 100, 100)
    assert by_corners(path, [[BOX]], [[(0.9, OTHER), (0.8, BOX)]]) == figures(50, 50, 50)
    half = 100 * 51 / 101
    assert by_corners(path, [[BOX], [OTHER]], [[(0.9, BOX)], []]) == figures(half, half, half), "recall of one half"
    narrow = by_corners(path, [[BOX]], [[(0.9, (0, 0, 10, 7))]])
    assert narrow == figures(50, 100, 0), "an overlap of 0.7 counts up to 0.70"
    assert by_corners(path, [[BOX]], [[]]) == figures(0, 0, 0)
    assert by_corners(path, [[]], [[(0.5, BOX)]]) == {}, "there is nothing to find"


@needs_coco
def test_a_box_is_found_once_and_crowds_neither_help_nor_hurt(tmp_path: Path) -> None:
    doubled = by_corners(tmp_path / "x.json", [[BOX], [BOX]], [[(0.9, BOX), (0.8, BOX)], [(0.7, BOX)]])
    area = 100 * (51 + 50 * 2 / 3) / 101
    assert doubled == figures(area, area, area)
    inside: list[tuple[float, Corners]] = [(0.9, (25, 5, 35, 15)), (0.8, BOX), (0.7, (40, 5, 50, 15))]
    assert by_corners(tmp_path / "x.json", [[BOX, (20, 0, 60, 40, 1)]], [inside]) == figures(100, 100, 100)


def test_places_of_boxes(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    data, _ = boxes_by_rule()
    path.write_text(json.dumps(data), "utf-8")
    annotations = read_annotations(path)
    assert (annotations.sizes["p3"], annotations.categories) == ((200, 150), CATEGORIES)
    assert sum(map(len, annotations.boxes.values())) == 60
    left, top, width, height = data["annotations"][0]["bbox"]
    first = annotations.boxes[f"p{data['annotations'][0]['image_id']}", data["annotations"][0]["category_id"]][0]
    assert first == pytest.approx([left, top, left + width, top + height])


def test_a_box_of_no_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    data, _ = boxes_by_rule()
    path.write_text(json.dumps({**data, "images": data["images"][1:]}), "utf-8")
    with pytest.raises(DataError, match="has a box of the picture 0, which it does not list"):
        Truths.read("bbox", path)


@pytest.mark.parametrize("text", ["no json", "[]", '{"images": [{"id": 1}], "annotations": [], "categories": []}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match="should be COCO annotations"):
        read_annotations(path)
