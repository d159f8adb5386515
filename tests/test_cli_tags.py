"""`tags`: what is printed, in both forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from seesr_core.cli import main as cli
from seesr_core.formats.ram import write_dape

from .tiny_model import TAGS, photo, tagger


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tagger alone is enough."""
    folder = tmp_path_factory.mktemp("model")
    write_dape(folder / "dape.safetensors", *tagger())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    place.mkdir()
    photo(seed=0).save(place / "a.png")
    photo(seed=1).save(place / "b.png")
    (place / "empty.png").touch()
    return place


def run(model: Path, *arguments: object) -> int:
    return cli.main(["tags", *map(str, arguments), "--model", str(model), "--device", "cpu"])


def test_tags_with_scores_the_strongest_first(model: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(model, folder / "a.png", "--threshold", 0.5) == 0
    line = capfd.readouterr().out
    name, _, listed = line.rstrip("\n").partition(": ")
    assert name == str(folder / "a.png")
    tags = [item.rsplit(" ", 1) for item in listed.split(", ")]
    scores = [float(score) for _, score in tags]
    assert len(scores) > 1
    assert scores == sorted(scores, reverse=True)
    assert {tag for tag, _ in tags} <= set(TAGS)


def test_a_high_threshold_leaves_none(model: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(model, folder / "a.png", "--threshold", 3) == 0
    assert capfd.readouterr().out == f"{folder / 'a.png'}: no tags\n"


def test_json_of_a_folder_with_a_bad_photo(model: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(model, folder, "--json", "--language", "zh") == 1
    out, err = capfd.readouterr()
    entries = json.loads(out)
    assert [Path(entry["file"]).name for entry in entries] == ["a.png", "b.png"]
    assert all(0 < tag["score"] < 1 for entry in entries for tag in entry["tags"])
    assert err.startswith("error: 1 of 3 photos failed:\n")
    assert "empty.png is empty" in err


def test_one_bad_photo_is_one_line(model: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(model, folder / "empty.png") == 1
    assert capfd.readouterr().err.startswith(f"error: {folder / 'empty.png'} is empty (0 bytes)")


@pytest.mark.parametrize("options", [["--threshold", "-1"], ["--language", "fr"], []])
def test_wrong_usage(model: Path, folder: Path, capfd: pytest.CaptureFixture[str], options: list[str]) -> None:
    arguments = [folder / "a.png", *options] if options else []
    assert run(model, *arguments) == 2
    assert capfd.readouterr().err.startswith("error: ")


def test_a_folder_without_a_tagger(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "model")
    assert run(tmp_path / "model", folder / "a.png") == 1
    assert "has no tagger; expected a DAPE file of this project" in capfd.readouterr().err
