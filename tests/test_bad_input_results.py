"""Results that cannot be written: found out before the work where possible, and never half a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from seesr_core.errors import ImageError, ResourceError
from seesr_core.pictures.writing import FORMATS, check_fits, check_target, save_picture

from .full_disk import files_of_at_most
from .tiny_model import photo


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


@pytest.mark.parametrize("suffix", [suffix for suffix, kind in FORMATS.items() if kind.stills])
def test_every_format_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"result{suffix}"
    save_picture(path, photo(32, 32), icc=b"profile")
    with Image.open(path) as again:
        assert (again.size, again.mode, again.info["icc_profile"]) == ((32, 32), "RGB", b"profile")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_transparency_comes_back(tmp_path: Path, suffix: str) -> None:
    picture = photo(mode="RGBA")
    picture.putalpha(photo(seed=4, mode="L"))
    save_picture(tmp_path / f"result{suffix}", picture)
    with Image.open(tmp_path / f"result{suffix}") as again:
        assert again.getchannel("A").tobytes() == picture.getchannel("A").tobytes()


@pytest.mark.parametrize(("name", "found"), [("result.heic", "the unknown suffix .heic"), ("result", "no suffix")])
def test_an_unknown_format(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(ImageError, match=rf"{name} has {found}: expected one of \.png, \.jpg"):
        check_target(tmp_path / name)


def test_a_place_that_cannot_be_written_to(file: Path) -> None:
    with pytest.raises(ResourceError, match=r"Cannot write into .*file: .*\. Choose another folder"):
        check_target(file / "result.png")


def test_a_folder_in_the_results_place(tmp_path: Path) -> None:
    (tmp_path / "result.png").mkdir()
    with pytest.raises(ResourceError, match=r"result\.png is a folder"):
        check_target(tmp_path / "result.png")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("wide.jpg", (80_000, 200), r"has 80000×200 pixels, JPEG holds up to 65535 a side; choose \.png"),
        ("wide.webp", (16_384, 64), "WEBP holds up to 16383 a side"),
        ("huge.tif", (40_000, 40_000), r"has 4\.8 GB of pixels, TIFF holds up to 4 GB"),
    ],
)
def test_results_that_a_format_cannot_hold(tmp_path: Path, name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        check_fits(tmp_path / name, size, alpha=False)
    check_fits(tmp_path / "result.png", (80_000, 200), alpha=True)


def test_a_format_without_transparency(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"logo\.jpg: JPEG cannot keep the photo's transparency; choose \.png"):
        check_fits(tmp_path / "logo.jpg", (64, 64), alpha=True)
    check_fits(tmp_path / "photo.jpg", (64, 64), alpha=False)


def test_a_disk_with_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(ResourceError, match=r"\(8000×8000 pixels\) needs at least 4 MB on disk, .* has 1 MB left"):
        check_fits(tmp_path / "result.png", (8000, 8000), alpha=False)


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "result.png"
    save_picture(path, photo())
    before = path.read_bytes()
    with files_of_at_most(10), pytest.raises(ResourceError, match=r"Could not write .*result\.png: File too large"):
        save_picture(path, photo(seed=1))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
