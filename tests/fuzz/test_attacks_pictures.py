"""Pictures made to do harm: no program is started, memory stays bounded, and one sentence says what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from seesr_core.cli.jobs import list_photos
from seesr_core.errors import DataError, ImageError, SeeSRError
from seesr_core.pictures.opening import FORMATS_READ, suffixes_read
from seesr_core.pictures.reading import read_photo
from trainer.data.photos import load_rgb
from trainer.evaluate.pictures import read_picture
from trainer.evaluate.semantics.panoptic import PanopticAnnotations

from .attacks import EPS_LOOP, png

READERS: dict[str, Callable[[Path], object]] = {
    "command line": read_photo,
    "training": load_rgb,
    "evaluation": read_picture,
    "panoptic": lambda path: PanopticAnnotations(
        categories={}, stuff=set(), files={"a": path}, segments={"a": {}}
    ).read("a"),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return READERS[request.param]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if anything starts Ghostscript."""
    programs, mark = tmp_path / "programs", tmp_path / "started"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for at its first use
    return mark


@pytest.mark.parametrize("suffix", [".jpg", ".eps", ""])
def test_no_picture_starts_a_program(
    tmp_path: Path, started: Path, reader: Callable[[Path], object], suffix: str
) -> None:
    path = tmp_path / f"loop{suffix}"
    path.write_bytes(EPS_LOOP)
    with pytest.raises(SeeSRError, match=r"not a picture that can be read|as a PNG"):
        reader(path)
    assert not started.exists()


def test_the_case_above_would_have_started_one(tmp_path: Path, started: Path) -> None:
    (tmp_path / "loop.jpg").write_bytes(EPS_LOOP)
    with Image.open(tmp_path / "loop.jpg") as picture, pytest.raises(Exception):  # noqa: B017, PT011
        picture.load()
    assert started.exists()


def test_suffixes_are_those_of_the_formats_that_are_read(tmp_path: Path) -> None:
    assert {".jpg", ".png", ".webp", ".tif", ".avif", ".bmp", ".gif"} <= suffixes_read()
    assert not {".eps", ".ps", ".pdf", ".fli", ".wmf"} & suffixes_read()
    for name in ("a.png", "b.eps"):
        (tmp_path / name).touch()
    photos, left_out = list_photos(tmp_path)
    assert [[path.name for path in paths] for paths in (photos, left_out)] == [["a.png"], ["b.eps"]]


def test_readers_that_start_programs_are_not_on_the_list() -> None:
    assert not {"EPS", "WMF", "PDF", "FPX", "MIC", "IPTC", "GBR", "TGA"} & set(FORMATS_READ)


def test_a_picture_that_claims_more_pixels_than_its_bytes_can_hold(
    tmp_path: Path, reader: Callable[[Path], object]
) -> None:
    path = tmp_path / "strip.png"
    path.write_bytes(png(31, 10_268_440, data=bytes(2_000_000)))
    with pytest.raises(SeeSRError, match=r"31×10268440 pixels\) has .* bytes, too few|needs about 5\.1 GB"):
        reader(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SeeSRError, match="is a pipe or a device"):
        reader(tmp_path / "pipe.png")


def test_whatever_a_decoder_raises_is_one_kind_of_error(
    tmp_path: Path, reader: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVIF's say RuntimeError where others say OSError."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def decoder(*_: object) -> None:
        raise RuntimeError("Failed to decode image: Truncated data")

    monkeypatch.setattr(Image.Image, "convert", decoder)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoder)
    with pytest.raises((ImageError, DataError), match="Truncated data"):
        reader(tmp_path / "a.png")
