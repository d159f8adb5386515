"""Panoptic quality and mean IoU by hand, and COCO's panoptic files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seesr_core.errors import DataError
from trainer.evaluate.semantics.panoptic import VOID, MeanIoU, PanopticQuality, Segment, Segmented, read_panoptic

CAT, DOG, SKY = 1, 2, 3


def cut(rows: list[list[int]], **segments: int | tuple[int, bool]) -> Segmented:
    """A picture from its segment numbers; `_7=CAT` or `_7=(CAT, True)` for a group."""
    made = {
        int(name[1:]): Segment(*given) if isinstance(given, tuple) else Segment(given)
        for name, given in segments.items()
    }
    return Segmented(np.array(rows, dtype=np.int64), made)


def quality(truth: Segmented, found: Segmented) -> float | None:
    judge = PanopticQuality()
    judge.add(truth, found)
    return judge.result()


TRUTH = cut([[1, 1, 1, 1, 2, 2, 2, 2], [3] * 8], _1=CAT, _2=DOG, _3=SKY)


def test_the_truth_itself_is_perfect() -> None:
    assert quality(TRUTH, cut([[5, 5, 5, 5, 9, 9, 9, 9], [4] * 8], _5=CAT, _9=DOG, _4=SKY)) == 100


def test_by_hand() -> None:
    """Cat: 3 of 4 pixels, nothing besides: IoU 3/4. Dog: called cat: one missed, one wrong cat. Sky: 8 of 9."""
    found = cut([[1, 1, 1, 3, 2, 2, 2, 2], [3] * 8], _1=CAT, _2=CAT, _3=SKY)
    cat, dog, sky = 0.75 / (1 + 0.5), 0.0, (8 / 9) / 1
    assert quality(TRUTH, found) == pytest.approx(100 * (cat + dog + sky) / 3)


def test_half_is_not_enough() -> None:
    """An IoU of exactly one half matches nothing: a miss and a wrong one."""
    found = cut([[1, 1, 0, 0, 2, 2, 2, 2], [3] * 8], _1=CAT, _2=DOG, _3=SKY)
    assert quality(TRUTH, found) == pytest.approx(100 * (0 + 1 + 1) / 3)


def test_pixels_of_no_true_segment_cost_nothing() -> None:
    truth = cut([[1, 1, 0, 0]], _1=CAT)
    assert quality(truth, cut([[1, 1, 1, 1]], _1=CAT)) == 100
    assert quality(truth, cut([[1, 1, 2, 2]], _1=CAT, _2=DOG)) == 100
    judge = PanopticQuality()
    judge.add(truth, cut([[0, 2, 2, 2]], _2=DOG))
    assert DOG not in judge.tallies, "two of its three pixels lie on nothing"
    assert judge.tallies[CAT].missed == 1


def test_groups_excuse_and_are_not_missed() -> None:
    truth = cut([[1, 1, 1, 1, 2, 2]], _1=(CAT, True), _2=DOG)
    found = cut([[1, 1, 3, 3, 2, 2]], _1=CAT, _2=DOG, _3=DOG)
    judge = PanopticQuality()
    judge.add(truth, found)
    assert CAT not in judge.tallies
    assert (judge.tallies[DOG].right, judge.tallies[DOG].wrong) == (1, 1), "another category's group excuses nothing"
    assert judge.result() == pytest.approx(100 / 1.5)


def test_over_pictures() -> None:
    """Tallies add up before the ratio is taken."""
    judge = PanopticQuality()
    judge.add(cut([[1, 1]], _1=CAT), cut([[1, 1]], _1=CAT))
    judge.add(cut([[1, 1]], _1=CAT), cut([[0, 0]]))
    assert judge.result() == pytest.approx(100 / 1.5)


def test_nothing_there_is_no_figure() -> None:
    assert quality(cut([[0, 0]]), cut([[0, 0]])) is None
    assert MeanIoU().result() is None


def test_agrees_with_torchmetrics() -> None:
    """On random pictures, in the part that it has in common with COCO's code: no groups, and every pixel is found."""
    metrics = pytest.importorskip("torchmetrics.detection", reason="torchmetrics is not installed")
    import torch

    rng = np.random.Generator(np.random.PCG64(3))
    judge = PanopticQuality()
    other = metrics.PanopticQuality(things={CAT, DOG}, stuffs={SKY}, allow_unknown_preds_category=True)
    for _ in range(12):
        truth_HW = rng.integers(0, 4, (3, 3)).repeat(5, 0).repeat(5, 1)
        found_HW = np.where((rng.random((15, 15)) < 0.2) | (truth_HW == 0), rng.integers(1, 4, (15, 15)), truth_HW)
        parts = [{int(n): Segment(int(n)) for n in np.unique(ids_HW) if n} for ids_HW in (truth_HW, found_HW)]
        judge.add(Segmented(truth_HW, parts[0]), Segmented(found_HW, parts[1]))
        maps = [torch.tensor(np.stack([ids, (ids > 0) & (ids < 3)], -1)[None]) for ids in (found_HW, truth_HW)]
        other.update(*maps)
    assert judge.result() == pytest.approx(100 * float(other.compute()), abs=1e-4)


def test_what_was_left_out_counts_as_in_cocos_code() -> None:
    """Three of four pixels: IoU 3/4. torchmetrics leaves the fourth out of the union; if it no longer does, use it."""
    truth, found = cut([[1, 1, 1, 1]], _1=CAT), cut([[1, 1, 1, 0]], _1=CAT)
    assert quality(truth, found) == 75
    metrics = pytest.importorskip("torchmetrics.detection", reason="torchmetrics is not installed")
    import torch

    other = metrics.PanopticQuality(things={CAT, DOG}, stuffs={SKY}, allow_unknown_preds_category=True)
    other.update(*(torch.tensor(np.stack([part.ids_HW, part.ids_HW], -1)[None]) for part in (found, truth)))
    assert float(other.compute()) == 1


def test_mean_iou_by_hand() -> None:
    """Cat 2 / (3 + 2 − 2), dog 2 / (2 + 3 − 2); what is not in the truth has no part in the mean."""
    judge = MeanIoU()
    truth = np.array([[CAT, CAT, CAT, DOG, DOG, VOID, SKY]])
    judge.add(truth[:, :6], np.array([[CAT, CAT, DOG, DOG, DOG, SKY]]))
    assert judge.result() == pytest.approx(100 * (2 / 3 + 2 / 3) / 2)
    judge.add(truth[:, 6:], np.array([[VOID]]))
    assert judge.result() == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)


def test_class_maps() -> None:
    parts = cut([[1, 2, 0]], _1=CAT, _2=SKY)
    assert parts.classes().tolist() == [[CAT, SKY, VOID]]
    assert parts.only({CAT: "cat"}).classes().tolist() == [[CAT, VOID, VOID]]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A file of one picture, segments 7 and 258."""
    (tmp_path / "panoptic").mkdir()
    pixels = np.array([[[7, 0, 0], [2, 1, 0], [0, 0, 0]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "panoptic" / "a.png")
    parts = [{"id": 7, "category_id": CAT, "iscrowd": 1}, {"id": 258, "category_id": SKY}]
    data = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": parts}],
        "categories": [{"id": CAT, "name": "cat", "isthing": 1}, {"id": SKY, "name": "sky", "isthing": 0}],
    }
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps(data), "utf-8")
    return path


def test_coco_files(coco: Path) -> None:
    annotations = read_panoptic(coco)
    assert annotations.stuff == {SKY}
    picture = annotations.read("a")
    assert picture.ids_HW.tolist() == [[7, 258, 0]]
    assert picture.segments == {7: Segment(CAT, crowd=True), 258: Segment(SKY)}


def test_files_that_are_something_else(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--panoptic-masks"):
        read_panoptic(coco, tmp_path / "nowhere")
    annotations = read_panoptic(coco)
    (tmp_path / "panoptic" / "a.png").write_text("no picture")
    with pytest.raises(DataError, match="should hold the segments of a"):
        annotations.read("a")
    coco.write_text('{"annotations": [{}], "categories": []}')
    with pytest.raises(DataError, match="should be COCO panoptic annotations"):
        read_panoptic(coco)
