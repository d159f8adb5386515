"""The tiny model, a photo and a folder of good and bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..tiny_model import photo


@pytest.fixture
def model(complete: Path) -> Path:
    return complete


@pytest.fixture
def source(tmp_path: Path) -> Path:
    photo(20, 16).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good photos of one name, one with transparency, three bad files, and one that is none."""
    place = tmp_path / "photos"
    place.mkdir()
    photo(seed=1).save(place / "a.jpg")
    photo(seed=2).save(place / "a.png")
    logo = photo(seed=3, mode="RGBA")
    logo.putalpha(128)
    logo.save(place / "logo.webp", lossless=True)
    (place / "broken.jpg").write_bytes((place / "a.jpg").read_bytes()[:200])
    (place / "empty.png").touch()
    frames = [photo(seed=i) for i in range(3)]
    frames[0].save(place / "film.gif", save_all=True, append_images=frames[1:])
    (place / "notes.txt").write_text("not a picture")
    return place
