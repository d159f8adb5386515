"""`upscale` of folders: names of results, what is skipped, what is listed, processes beside each other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from seesr_core.cli import upscale

from ..tiny_model import photo
from .command import names, run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three photos, one in a folder of its own and one in a hidden one."""
    place = tmp_path / "tree"
    for name in ("a.jpg", "deep/b.webp", ".cache/c.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        photo(8, 8).save(place / name)
    return place


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["a.png"]),
        (("--recursive",), ["a.png", "deep/b.png"]),
        (("--recursive", "--format", "same"), ["a.jpg", "deep/b.webp"]),
        (("--format", "webp", "--suffix", "_4x"), ["a_4x.webp"]),
    ],
)
def test_names_of_results(
    options: tuple[str, ...], expected: list[str], model: Path, tree: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(model, tree, out, *options) == 0
    assert names(out) == expected
    with Image.open(out / expected[0]) as result:
        assert result.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[expected[0].rsplit(".", 1)[1]]


def test_results_inside_the_searched_folder_are_not_photos(model: Path, tree: Path) -> None:
    for _ in range(2):
        assert run(model, tree, tree / "out", "--recursive") == 0
    assert names(tree / "out") == ["a.png", "deep/b.png"]


def test_a_pattern_is_a_folder_of_its_photos(model: Path, tree: Path, tmp_path: Path) -> None:
    assert run(model, tree / "**" / "*.webp", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["deep/b.png"]


def test_several_processes_share_the_photos_out(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each photo in one process, whichever begins first; each failure told once; reports of their own."""
    out, seen = tmp_path / "out", []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        run(model, folder, out, "--json", tmp_path / "report.json")
        report = json.loads((tmp_path / f"report.{rank}.json").read_text())
        seen.append({Path(entry["input"]).name: entry["status"] for entry in report["photos"]})
    assert not seen[0].keys() & seen[1].keys()
    assert {**seen[0], **seen[1]}.keys() == {"a.jpg", "a.png", "logo.webp", "broken.jpg", "empty.png", "film.gif"}
    assert names(out) == ["a.jpg.png", "a.png.png", "logo.png"]
    assert capfd.readouterr().err.count("empty.png") == 1


def test_a_dry_run_writes_nothing(
    model: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upscale, "load_models", None)
    assert run(model, folder, tmp_path / "out", "--dry-run", "--to", "80") == 1  # for the three bad files
    said = capfd.readouterr().out
    assert "logo.png: 16×16 to 80×80 with the embedded small model: 2 steps of 1 tiles" in said
    assert not names(tmp_path / "out")


def test_a_folder_goes_on_past_bad_photos_and_lists_them(
    model: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target, report = tmp_path / "results", tmp_path / "report.json"
    assert run(model, folder, target, "--json", report) == 1
    assert sorted(os.listdir(target)) == ["a.jpg.png", "a.png.png", "logo.png"]
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "warning: left out, not pictures by their suffix: notes.txt"
    assert lines[1] == "error: 3 of 6 photos failed:"
    assert [word in line for word, line in zip(("broken.jpg", "empty.png", "film.gif"), lines[2:], strict=True)]
    photos = json.loads(report.read_text())["photos"]
    assert [entry["status"] for entry in photos] == ["done"] * 3 + ["failed"] * 3
    assert "is empty (0 bytes)" in photos[4]["error"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_links_that_lead_nowhere_and_pipes_are_listed(
    model: Path, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "photos"
    place.mkdir()
    source.rename(place / "a.png")
    (place / "b.png").symlink_to(tmp_path / "gone.png")
    (place / "c").symlink_to(place / "c")
    os.mkfifo(place / "d.jpg")
    assert run(model, place, tmp_path / "out") == 1
    assert names(tmp_path / "out") == ["a.png"]
    told = capfd.readouterr().err.splitlines()
    assert told[0] == "error: 3 of 4 photos failed:"
    assert [word in line for word, line in zip(("b.png", "/c", "d.jpg"), told[1:], strict=True)] == [True] * 3


def test_a_second_run_skips_what_is_done(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("broken.jpg", "empty.png", "film.gif"):
        (folder / name).unlink()
    target, report = tmp_path / "results", tmp_path / "report.json"
    assert run(model, folder, target) == 0
    (target / "logo.png").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert run(model, folder, target, "--json", report) == 0
    after = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"logo.png"}
    statuses = [entry["status"] for entry in json.loads(report.read_text())["photos"]]
    assert sorted(statuses) == ["done", "skipped", "skipped"]

    monkeypatch.setattr(upscale, "load_models", lambda *_, **__: pytest.fail("a finished folder needs no model"))
    assert run(model, folder, target) == 0


def test_a_folder_as_out_of_one_photo_takes_its_name(model: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert run(model, source, tmp_path / "results") == 0
    assert os.listdir(tmp_path / "results") == ["photo.png"]
