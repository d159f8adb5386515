"""The fixed test set of degraded photos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import DataError, SettingsError
from trainer.degradation import DegradationConfig, SharpenConfig
from trainer.evaluate.testsets.degrade import Options, central_square, degraded, main, make_pairs, spread

from .tiny_model import photo

FAST = DegradationConfig(sharpen=SharpenConfig(radius=7, fast=True))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, (name, size) in enumerate({"a": (70, 64), "b": (64, 100), "small": (63, 90)}.items()):
        photo(*size, seed).save(folder / f"{name}.png")
    return folder


def pairs(photos: Path, out: Path, **changes) -> dict:
    return make_pairs(Options(photos=photos, out=out, hr_size=64, degradation=FAST, **changes))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pairs_and_their_description(photos: Path, tmp_path: Path) -> None:
    report = pairs(photos, tmp_path / "out")
    assert (report["photos"], report["too_small"]) == (["a.png", "b.png"], ["small.png"])
    assert json.loads((tmp_path / "out" / "pairs.json").read_text("utf-8"))["degradation"]["scale"] == 4
    assert np.array_equal(pixels(tmp_path / "out" / "HR" / "a.png"), pixels(photos / "a.png")[:, 3:67])
    assert pixels(tmp_path / "out" / "LR" / "a.png").shape == (16, 16, 3)
    assert sorted(path.name for path in (tmp_path / "out" / "LR").iterdir()) == ["a.png", "b.png"]


def test_a_pair_depends_on_seed_and_name_alone(photos: Path, tmp_path: Path) -> None:
    pairs(photos, tmp_path / "all")
    (photos / "a.png").unlink()
    pairs(photos, tmp_path / "one")
    pairs(photos, tmp_path / "other", seed=1)
    reference = pixels(tmp_path / "all" / "LR" / "b.png")
    assert np.array_equal(reference, pixels(tmp_path / "one" / "LR" / "b.png"))
    assert not np.array_equal(reference, pixels(tmp_path / "other" / "LR" / "b.png"))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8) + 100
    assert not torch.equal(degraded(image, "x", FAST, seed=0), degraded(image, "y", FAST, seed=0))


def test_refusals(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="128² pixels"):
        make_pairs(Options(photos=photos, out=tmp_path / "out", hr_size=128))
    with pytest.raises(SettingsError, match="multiple of 32"):
        Options(photos=photos, out=tmp_path, hr_size=100)
    (photos / "more").mkdir()
    shutil.copy(photos / "a.png", photos / "more" / "a.png")
    with pytest.raises(DataError, match="Several photos are called a"):
        pairs(photos, tmp_path / "out")


def test_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    sharpen = ["--degradation.sharpen.radius", "7", "--degradation.sharpen.fast"]
    assert main(["--photos", str(photos), "--out", str(out), "--hr-size", "64", "--limit", "1", *sharpen]) == 0
    assert capsys.readouterr().out == f"1 pairs in {out}, 0 photos were too small\n"


def test_squares_and_spread() -> None:
    assert central_square(torch.zeros(3, 10, 7), 8) is None
    assert spread(list("abcdef"), 3) == ["a", "c", "e"]
    assert spread(list("ab"), 0) == spread(list("ab"), 9) == ["a", "b"]
