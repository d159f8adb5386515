"""Pages for the eye: every version of a photo, whole and at the places of most detail."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import SettingsError
from trainer.evaluate.commands import main
from trainer.evaluate.report.photo_pages import Options, detailed_places, named_folders

from .tiny_model import photo

CROP = 32


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for kind in ("lr", "sr", "hr", "teacher"):
        (tmp_path / kind).mkdir()
    for seed, name in enumerate(("one", "two & three")):
        hr = photo(96, 80, seed)
        hr.save(tmp_path / "hr" / f"{name}.png")
        hr.resize((24, 20), Image.Resampling.BOX).save(tmp_path / "lr" / f"{name}.png")
        hr.point(lambda level: level // 2).save(tmp_path / "sr" / f"{name}.png")
    hr.save(tmp_path / "teacher" / "two & three.jpg")
    return tmp_path


def flags(work: Path, *more: str) -> list[str]:
    folders = ["--lr", str(work / "lr"), "--sr", str(work / "sr"), "--out", str(work / "out")]
    return ["sheet", *folders, "--crop", str(CROP), *more]


def test_the_squares_with_most_detail_and_no_overlap() -> None:
    image = torch.full((3, 64, 96), 100, dtype=torch.uint8)
    stripes = torch.arange(16) % 2 * 100
    image[:, 16:32, 48:64] += stripes.byte()
    image[:, 48:64, 0:16] += (stripes // 2).byte()
    assert detailed_places(image, 16, 2) == [(48, 16), (0, 48)]
    third = detailed_places(image, 16, 3)[2]
    assert all(abs(third[0] - x) >= 16 or abs(third[1] - y) >= 16 for x, y in [(48, 16), (0, 48)])
    assert detailed_places(torch.zeros(3, 40, 40, dtype=torch.uint8), 16, 2) == [(0, 0), (16, 0)], "topmost, leftmost"
    assert detailed_places(image, 500, 3) == [(0, 0)], "cut to the shorter side"


def test_pages_show_every_version_at_its_own_pixels(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--hr", str(work / "hr"), "--beside", f"teacher={work / 'teacher'}", "--crops", "1", "--name", "nano"]
    assert main(flags(work, *more)) == 0
    assert capsys.readouterr().out == f"2 pages: {work / 'out' / 'index.html'}\n"
    (place,) = detailed_places(
        torch.from_numpy(np.array(Image.open(work / "hr" / "one.png"))).permute(2, 0, 1), CROP, 1
    )
    left, top = place
    page = np.asarray(Image.open(work / "out" / "one.png"))
    versions = ["nearest", "bicubic", "sr", "hr"]  # `one` has no picture of the teacher's
    assert page.shape[1] == len(versions) * (CROP + 4)
    small = round(80 * CROP / 96)
    row = (32 + small + 4) + 32
    for column, kind in enumerate(versions):
        if kind in ("sr", "hr"):
            shown = page[row : row + CROP, column * (CROP + 4) : column * (CROP + 4) + CROP]
            whole = np.asarray(Image.open(work / kind / "one.png"))
            assert np.array_equal(shown, whole[top : top + CROP, left : left + CROP])
    assert Image.open(work / "out" / "two & three.png").width == 5 * (CROP + 4)
    index = (work / "out" / "index.html").read_text("utf-8")
    assert '<img src="two%20%26%20three.png" alt="two &amp; three">' in index


def test_without_originals_the_photo_chooses_the_places(work: Path) -> None:
    assert main(flags(work, "--limit", "1")) == 0
    assert [path.name for path in sorted((work / "out").iterdir())] == ["index.html", "one.png"]
    assert Image.open(work / "out" / "one.png").width == 3 * (CROP + 4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--beside", "teacher"], "--beside wants NAME=DIR"),
        (["--beside", "HR=x"], "Several versions are called HR"),
        (["--crop", "1"], "--crop must be at least 16"),
    ],
)
def test_refusals(work: Path, caplog: pytest.LogCaptureFixture, more: list[str], message: str) -> None:
    with caplog.at_level(logging.ERROR):
        assert main(flags(work, *more)) == 1
    assert message in caplog.records[-1].getMessage()


def test_sizes_have_to_agree(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    photo(48, 40).save(work / "hr" / "one.png")
    assert main(flags(work, "--hr", str(work / "hr"))) == 1
    assert "has 48×40, the result has 96×80 pixels; only pictures of one size" in caplog.records[-1].getMessage()


def test_names_of_folders() -> None:
    assert named_folders(["a=b", "c=d=e"]) == {"a": Path("b"), "c": Path("d=e")}
    with pytest.raises(SettingsError, match="twice"):
        named_folders(["a=b", "a=c"])
    assert Options(lr=Path("l"), sr=Path("s"), out=Path("o")).beside == ()
