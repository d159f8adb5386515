"""What goes beside the pixels goes from photo to result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from seesr_core.pictures.reading import read_photo
from seesr_core.pictures.writing import save_picture

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6" tiff:ImageWidth="20" '
    b'exif:PixelXDimension="20" dc:title="by hand"/></rdf:RDF></x:xmpmeta>'
)
MAKE, ORIENTATION, EXIF_IFD, GPS_IFD, DATE, WIDTH, HEIGHT = 0x010F, 0x0112, 0x8769, 0x8825, 0x9003, 0xA002, 0xA003


def exif() -> Image.Exif:
    made = Image.Exif()
    made[MAKE], made[ORIENTATION] = "A camera", 6
    made.get_ifd(EXIF_IFD).update({DATE: "2020:01:02 03:04:05", WIDTH: 20, HEIGHT: 10})
    made.get_ifd(GPS_IFD).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return made


def written(folder: Path, suffix: str) -> Path:
    """A photo of 20×10 pixels that lies on its side, with all that its format holds."""
    path = folder / f"photo{suffix}"
    more: dict[str, Any] = {"exif": exif(), "dpi": (300, 300)}
    if suffix == ".png":
        info = PngInfo()
        info.add_text("Author", "Somebody")
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        more["pnginfo"] = info
    else:
        more["xmp"] = XMP
    Image.new("RGB", (20, 10), (200, 100, 50)).save(path, **more)
    return path


def through(source: Path, target: Path) -> Image.Image:
    """The result's file, of twice the photo's size, opened."""
    photo = read_photo(source)
    result = Image.new("RGB", (2 * photo.size[0], 2 * photo.size[1]))
    save_picture(target, photo.like(result), metadata=photo.metadata)
    return Image.open(target)


SUFFIXES = [".jpg", ".png", ".webp", ".tif", *([".avif"] if features.check("avif") else [])]


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("source", [".jpg", ".png", ".webp"])
def test_exif_stays_upright_and_with_the_new_size(source: str, target: str, tmp_path: Path) -> None:
    with through(written(tmp_path, source), tmp_path / f"result{target}") as result:
        assert result.size == (20, 40), "turned upright"
        found = result.getexif()
        assert found[MAKE] == "A camera"
        assert found.get(ORIENTATION, 1) == 1
        if target == ".tif":
            return  # the main directory only
        details = found.get_ifd(EXIF_IFD)
        assert details[DATE] == "2020:01:02 03:04:05"
        assert (details[WIDTH], details[HEIGHT]) == (20, 40)
        assert found.get_ifd(GPS_IFD)[1] == "N"


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("source", [".jpg", ".png", ".webp"])
def test_xmp_stays_with_the_new_size(source: str, target: str, tmp_path: Path) -> None:
    with through(written(tmp_path, source), tmp_path / f"result{target}") as result:
        packet = result.info.get("xmp") or result.info.get("XML:com.adobe.xmp")
    packet = packet if isinstance(packet, bytes) else str(packet).encode()
    assert b'dc:title="by hand"' in packet
    assert b'tiff:Orientation="1"' in packet
    assert b'tiff:ImageWidth="20" exif:PixelXDimension="20"' in packet


@pytest.mark.parametrize("target", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("source", [".jpg", ".png"])
def test_resolution_and_texts_stay(source: str, target: str, tmp_path: Path) -> None:
    with through(written(tmp_path, source), tmp_path / f"result{target}") as result:
        assert [round(float(value)) for value in result.info["dpi"]] == [300, 300]
        if source == target == ".png":
            assert result.info["Author"] == "Somebody"


def test_damaged_exif_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (20, 10)).save(path, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x02")
    with through(path, tmp_path / "result.jpg") as result:
        assert not len(result.getexif())
