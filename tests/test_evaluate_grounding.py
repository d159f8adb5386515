"""`trainer.evaluate.grounding`: collages, boxes, what counts as in place, and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.dape import DAPE, Tag, Vocabulary
from seesr_core.dape.grounding import METHODS
from seesr_core.errors import DataError
from trainer.data.photos import Photo
from trainer.evaluate.semantics import grounding
from trainer.evaluate.semantics.boxes import Boxes
from trainer.evaluate.semantics.grounding import LAYOUTS, Options, Tally, box_mask, collage

from .tiny_model import tagger


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four photos of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        levels = np.random.Generator(np.random.PCG64(i)).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((40 + 8 * i, 50), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tagger without a file."""

    def read(path: Path, tag_lists: Path | None = None) -> tuple[DAPE, Vocabulary]:
        return tagger()

    monkeypatch.setattr(grounding, "read_teacher", read)


def test_collages_put_each_photo_in_both_places() -> None:
    red, green = (torch.zeros(3, 30, 20 + 10 * i) for i in range(2))
    red[0], green[1] = 1.0, 1.0
    shapes, firsts = [], []
    for layout in LAYOUTS:
        picture, place = collage(red, green, layout, 16)
        assert torch.equal(picture[0] > 0.5, place)
        assert torch.equal(picture[1] > 0.5, ~place)
        shapes.append(tuple(picture.shape[1:]))
        firsts.append(bool(place[0, 0]))
    assert shapes == [(16, 32), (16, 32), (32, 16), (32, 16)]
    assert firsts == [True, False, True, False]


def test_what_counts_as_in_place() -> None:
    place = torch.zeros(4, 4, dtype=torch.bool)
    place[:, :2] = True
    mostly, wrong = torch.full((4, 4), 0.1), torch.full((4, 4), 0.1)
    mostly[0, 1], wrong[2, 3] = 1.0, 1.0
    tally = Tally()
    tally.add(mostly, place)
    tally.add(wrong, place)
    assert (tally.right, tally.pointed, tally.tags) == (1, 1, 2)
    assert tally.mass == pytest.approx(1.7 / 2.5 + 0.8 / 2.5)
    assert tally.area == pytest.approx(1.0)


def test_boxes_are_scaled_to_the_picture_and_never_vanish() -> None:
    boxes: Boxes = np.array([[0, 0, 50, 100], [99, 99, 99.2, 99.2]], dtype=np.float64)
    mask = box_mask(boxes, 10, 20, 0.1, 0.2)
    assert mask[:, :10].all()
    assert mask.sum() == 101


def test_report_on_collages(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grounding, "_names", lambda _asked, photo: {photo.path.stem})
    told = grounding.evaluate(
        Options(tagger=Path("x"), photos=photos, json=tmp_path / "report.json", partners=1, threshold=0.6, resamples=50)
    )
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == told
    assert set(told["rows"]) == set(METHODS)
    for row in told["rows"].values():
        assert row["groups"] == 4
        assert row["tags"] > 0
        assert 0 <= row["right"]["low"] <= row["right"]["high"] <= 100
        assert row["area"]["value"] == pytest.approx(50.0)
    assert "| windows |" in grounding.table(told)


def test_partners_share_no_tag(photos: Path) -> None:
    class Known:
        options = Options(tagger=Path("x"), photos=photos, json=Path("x.json"), partners=3)

        def alone(self, photo: Photo) -> list[Tag]:
            return [Tag("cat" if photo.path.name < "2" else "dog", 1.0, 0)]

    listed = [Photo(path) for path in sorted(photos.iterdir())]
    pairs = list(grounding._pairs(Known(), listed))  # type: ignore[arg-type]
    assert len(pairs) == 8
    assert all((a.path.name < "2") != (b.path.name < "2") for a, b in pairs)


def test_report_on_boxes(photos: Path, tmp_path: Path) -> None:
    names = tagger()[1].tags
    boxes = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 100} for i in range(4)],
        "categories": [{"id": 1 + k, "name": name.upper()} for k, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": 1 + k, "bbox": [0, 0, 40, 100]} for i in range(4) for k in range(len(names))
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes), "utf-8")
    options = Options(
        tagger=Path("x"),
        photos=photos,
        json=tmp_path / "report.json",
        boxes=tmp_path / "boxes.json",
        methods=("windows",),
        resamples=50,
    )
    row = grounding.evaluate(options)["rows"]["windows"]
    assert row["groups"] == 4
    assert row["area"]["value"] == pytest.approx(50.0, abs=2.0)


def test_nothing_to_ask_is_said(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tag that could be asked"):
        grounding.evaluate(
            Options(tagger=Path("x"), photos=photos, json=tmp_path / "report.json", threshold=10.0, resamples=50)
        )
