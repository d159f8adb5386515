"""Test sets that two people make alike."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import DataError, SettingsError
from trainer.degradation import DegradationConfig, SharpenConfig
from trainer.evaluate.commands import main
from trainer.evaluate.pictures import spread
from trainer.evaluate.testsets.make import Options, SquareOptions, compare, degraded, make_testset

from .tiny_model import photo

FAST = DegradationConfig(sharpen=SharpenConfig(radius=7, fast=True))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, (name, size) in enumerate({"a": (540, 520), "b": (512, 600), "small": (511, 600)}.items()):
        photo(*size, seed).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set")
    make(photos, out)
    return out


def make(photos: Path, out: Path, **changes) -> dict:
    given: dict[str, Any] = {"crops": 2, "degradation": FAST, **changes}
    return make_testset(Options(hr=photos, out=out, **given))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text("utf-8"))


def test_crops_and_their_manifest(photos: Path, made: Path) -> None:
    manifest = manifest_of(made)
    names = ["a_000", "a_001", "b_000", "b_001"]
    assert list(manifest["pictures"]) == names == sorted(path.stem for path in (made / "LR").iterdir())
    assert manifest["too_small"] == ["small.png"]
    assert set(manifest["sources"]) == {"a.png", "b.png"}
    corners = []
    for name, entry in manifest["pictures"].items():
        left, top = entry["left"], entry["top"]
        source = pixels(photos / entry["source"])
        assert np.array_equal(pixels(made / "HR" / f"{name}.png"), source[top : top + 512, left : left + 512])
        assert pixels(made / "LR" / f"{name}.png").shape == (128, 128, 3)
        corners.append((left, top))
    assert corners[0] != corners[1]
    assert corners[2][0] == 0


@pytest.mark.slow
def test_two_people_get_the_same_whatever_else_they_make(photos: Path, made: Path, tmp_path: Path) -> None:
    again = make(photos, tmp_path / "again")
    assert json.loads(json.dumps(again)) == manifest_of(made)
    assert compare(again, made / "manifest.json").startswith("All 4 pairs have the pixels of ")
    fewer = make(photos, tmp_path / "fewer", crops=1)
    first = fewer["pictures"]["b_000"]
    assert first == again["pictures"]["b_000"]
    with pytest.raises(DataError, match=r"0 pairs have other pixels \(none\), 2 are only in one \(a_001, b_001\)"):
        compare(fewer, made / "manifest.json")
    other = make(photos, tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="4 pairs have other pixels"):
        compare(other, made / "manifest.json")
    with pytest.raises(DataError, match="should be the manifest"):
        compare(other, photos / "a.png")


def test_centres_of_real_pairs(tmp_path: Path) -> None:
    for kind, factor in (("hr", 4), ("lr", 1)):
        (tmp_path / kind).mkdir()
        photo(151 * factor, 170 * factor, 1).save(tmp_path / kind / "x.png")
        photo(100 * factor, 170 * factor, 2).save(tmp_path / kind / "narrow.png")
    manifest = make(tmp_path / "hr", tmp_path / "out", lr=tmp_path / "lr")
    entry = manifest["pictures"]["x"]
    assert (entry["left"], entry["top"]) == (11 * 4, 21 * 4)
    assert np.array_equal(pixels(tmp_path / "out/LR/x.png"), pixels(tmp_path / "lr/x.png")[21:149, 11:139])
    assert np.array_equal(pixels(tmp_path / "out/HR/x.png"), pixels(tmp_path / "hr/x.png")[84:596, 44:556])
    assert manifest["too_small"] == ["narrow.png"]
    assert "seed" not in manifest
    photo(600, 680).save(tmp_path / "hr" / "x.png")
    with pytest.raises(DataError, match="x: HR should be 4 times as large as LR, they have 600×680 and 151×170"):
        make(tmp_path / "hr", tmp_path / "out", lr=tmp_path / "lr")
    (tmp_path / "lr" / "x.png").unlink()
    with pytest.raises(DataError, match="--hr has x, the other folder has not"):
        make(tmp_path / "hr", tmp_path / "out", lr=tmp_path / "lr")


def test_refusals(photos: Path, tmp_path: Path) -> None:
    photo(100, 100).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"No photo of .* has 512² pixels"):
        make(tmp_path, tmp_path / "out")
    with pytest.raises(SettingsError, match="--crops must be at least 1"):
        make(photos, tmp_path, crops=-1)
    with pytest.raises(SettingsError, match="multiple of 32"):
        make(photos, tmp_path, hr_size=100)
    with pytest.raises(SettingsError, match="at scale 4, not 2"):
        make(photos, tmp_path, degradation=DegradationConfig(scale=2))
    photo(512, 512).save(tmp_path / "x.jpg")
    with pytest.raises(DataError, match="Several photos are called x"):
        make(tmp_path, tmp_path / "out")


def test_command_line(
    photos: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--hr", str(photos), "--out", str(tmp_path / "out"), "--expect", str(made / "manifest.json")]
    fast = ["--crops", "2", "--degradation.sharpen.radius", "7", "--degradation.sharpen.fast"]
    assert main(["testset", *flags, *fast]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"4 pairs in {tmp_path / 'out'}, 1 photos were too small"
    assert lines[1].startswith("All 4 pairs have the pixels of")
    with caplog.at_level(logging.ERROR):
        assert main(["testset", *flags, *fast, "--seed", "5"]) == 1
    assert "This is not the set of" in caplog.records[-1].getMessage()


@pytest.fixture
def small_photos(tmp_path: Path) -> Path:
    folder = tmp_path / "small_photos"
    folder.mkdir()
    for seed, (name, size) in enumerate({"a": (70, 64), "b": (64, 100), "small": (63, 90)}.items()):
        photo(*size, seed).save(folder / f"{name}.png")
    return folder


def squares(photos: Path, out: Path, **changes) -> dict:
    return make_testset(SquareOptions(hr=photos, out=out, hr_size=64, degradation=FAST, **changes))


def test_central_squares_and_their_manifest(small_photos: Path, tmp_path: Path) -> None:
    squares(small_photos, tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["kind"], manifest["sizes"]) == ("central squares, degraded", {"HR": 64, "LR": 16})
    assert (sorted(manifest["sources"]), manifest["too_small"]) == (["a.png", "b.png"], ["small.png"])
    assert [(e["left"], e["top"]) for e in manifest["pictures"].values()] == [(3, 0), (0, 18)]
    assert np.array_equal(pixels(tmp_path / "out" / "HR" / "a.png"), pixels(small_photos / "a.png")[:, 3:67])
    assert sorted(path.name for path in (tmp_path / "out" / "LR").iterdir()) == ["a.png", "b.png"]
    lr = degraded(
        torch.from_numpy(pixels(small_photos / "a.png")[:, 3:67].transpose(2, 0, 1).copy()), "a.png", FAST, seed=0
    )
    assert np.array_equal(pixels(tmp_path / "out" / "LR" / "a.png"), lr.permute(1, 2, 0).numpy())


def test_squares_are_described_in_pairs_json(small_photos: Path, made: Path, tmp_path: Path) -> None:
    """The file that the command has always written; crops never had it."""
    squares(small_photos, tmp_path / "out", seed=3)
    described = json.loads((tmp_path / "out" / "pairs.json").read_text("utf-8"))
    assert list(described) == ["seed", "hr_size", "degradation", "photos", "too_small"]
    assert (described["seed"], described["hr_size"]) == (3, 64)
    assert described["degradation"] == json.loads(json.dumps(asdict(FAST)))
    assert (described["photos"], described["too_small"]) == (["a.png", "b.png"], ["small.png"])
    assert not (made / "pairs.json").exists()


def test_a_pair_depends_on_seed_and_name_alone(small_photos: Path, tmp_path: Path) -> None:
    squares(small_photos, tmp_path / "all")
    (small_photos / "a.png").unlink()
    squares(small_photos, tmp_path / "one")
    squares(small_photos, tmp_path / "other", seed=1)
    reference = pixels(tmp_path / "all" / "LR" / "b.png")
    assert np.array_equal(reference, pixels(tmp_path / "one" / "LR" / "b.png"))
    assert not np.array_equal(reference, pixels(tmp_path / "other" / "LR" / "b.png"))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8) + 100
    assert not torch.equal(degraded(image, "x", FAST, seed=0), degraded(image, "y", FAST, seed=0))


@pytest.mark.parametrize("photos_flag", ["--photos", "--hr"])
def test_the_command_of_squares(
    small_photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], photos_flag: str
) -> None:
    out = tmp_path / "out"
    fast = ["--degradation.sharpen.radius", "7", "--degradation.sharpen.fast"]
    flags = [photos_flag, str(small_photos), "--out", str(out), "--hr-size", "64", "--limit", "1"]
    assert main(["degrade", *flags, *fast]) == 0
    assert capsys.readouterr().out == f"1 pairs in {out}, 0 photos were too small\n"


def test_spread() -> None:
    assert spread(list("abcdef"), 3) == ["a", "c", "e"]
    assert spread(list("ab"), 0) == spread(list("ab"), 9) == ["a", "b"]
