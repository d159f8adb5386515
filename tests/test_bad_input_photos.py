"""Every kind of photo file: read right, or refused in one sentence that says what to do."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from seesr_core.errors import ImageError, ResourceError
from seesr_core.pictures.reading import InputPhoto, read_photo

from .tiny_model import photo

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def animation(path: Path) -> Path:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    return saved(path, frames[0], save_all=True, append_images=frames[1:], duration=100)


def png(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel, (H, W, channels); Pillow writes none with colours."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def levels(read: InputPhoto) -> np.ndarray:
    return np.asarray(read.rgb).astype(int)


def refusal(path: Path, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        read_photo(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("Dear diary")
    assert "is not a picture that can be read: expected PNG, JPEG" in refusal(path)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert "is empty (0 bytes)" in refusal(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refusal(tmp_path / "nowhere.png")
    assert "is a folder: expected a picture file" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".gif"])
def test_a_truncated_file(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"photo{suffix}", photo(64, 64))
    path.write_bytes(path.read_bytes()[:-80])
    assert "truncated or damaged" in refusal(path)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", photo(64, 64))
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)
    assert "truncated or damaged" in refusal(path)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_an_animation_is_refused_unless_a_frame_is_chosen(tmp_path: Path, suffix: str) -> None:
    path = animation(tmp_path / f"film{suffix}")
    assert "is animated or has several pages (3): choose one with --frame, from 0" in refusal(path)
    assert np.abs(levels(read_photo(path, frame=1)) - GREEN).max() < 3
    assert "has no frame 3: expected 0 to 2" in refusal(path, frame=3)


def test_a_camera_file_with_a_preview_behind_it_is_a_photo(tmp_path: Path) -> None:
    path = animation(tmp_path / "camera.mpo")
    assert np.abs(levels(read_photo(path)) - RED).max() < 3


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_of_grey(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    read = read_photo(saved(tmp_path / f"grey{suffix}", Image.fromarray(values)))
    assert levels(read)[..., 0].tolist() == [[0, 1, 128, 255]]
    assert (read.grey, read.notes) == (True, ["16 bits a channel were read; the method works on 8"])


@pytest.mark.parametrize(("colour_type", "channels", "grey"), [(2, 3, False), (6, 4, False), (4, 2, True)])
def test_sixteen_bits_of_colour_and_alpha(tmp_path: Path, colour_type: int, channels: int, grey: bool) -> None:
    values = np.linspace(0, 65535, 5 * 4 * channels).reshape(4, 5, channels).astype(np.uint16)
    (tmp_path / "deep.png").write_bytes(png(values, colour_type))
    read = read_photo(tmp_path / "deep.png")
    colours = 1 if grey else 3
    assert np.abs(levels(read)[..., :colours] - values[..., :colours] / 257).max() <= 1
    assert (read.grey, read.alpha is not None, len(read.notes)) == (grey, channels in (2, 4), 1)


def test_heic_is_read_where_its_package_is(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    given = photo(64, 48)
    read = read_photo(saved(tmp_path / "photo.heic", given, quality=95))
    assert read.size == (64, 48)
    assert np.abs(levels(read) - np.asarray(given)).mean() < 6


def test_values_that_8_bits_cannot_stand_for(tmp_path: Path) -> None:
    floats = saved(tmp_path / "float.tif", Image.new("F", (4, 4), 0.5))
    assert "floating-point values: expected 8 or 16 bits" in refusal(floats)
    wide = saved(tmp_path / "wide.tif", Image.new("I", (4, 4), 70000))
    assert "values from 70000 to 70000: expected 16 bits" in refusal(wide)


def test_cmyk_without_a_profile(tmp_path: Path) -> None:
    read = read_photo(saved(tmp_path / "print.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100))
    assert np.abs(levels(read) - RED).max() < 4
    assert read.icc is None
    assert read.notes == ["CMYK was converted to RGB without a colour profile"]


def test_cmyk_with_a_profile_of_something_else(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    read = read_photo(saved(tmp_path / "print.tif", picture, icc_profile=srgb))
    assert np.abs(levels(read) - RED).max() < 4
    assert read.notes == ["CMYK was converted to RGB; the file's colour profile is damaged"]


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    picture = photo().convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    expected = np.asarray(picture.convert("RGB"))
    read = read_photo(saved(tmp_path / "palette.png", picture, transparency=0))
    assert (levels(read) == expected).all()
    assert read.alpha is not None
    assert set(np.asarray(read.alpha).flat) == {0, 255}


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_stays_grey(tmp_path: Path, mode: str) -> None:
    read = read_photo(saved(tmp_path / "grey.png", photo(mode=mode)))
    assert (read.grey, read.alpha) == (True, None)
    assert read.like(photo(64, 64)).mode == "L"


@pytest.mark.parametrize(("mode", "expected"), [("RGBA", "RGBA"), ("LA", "LA")])
def test_transparency_is_enlarged_beside_the_colours(tmp_path: Path, mode: str, expected: str) -> None:
    picture = photo(mode=mode)
    picture.putalpha(photo(seed=9, mode="L"))
    read = read_photo(saved(tmp_path / "logo.png", picture))
    result = read.like(photo(64, 64, seed=2))
    assert (result.mode, result.size) == (expected, (64, 64))
    alpha = photo(seed=9, mode="L").resize((64, 64), Image.Resampling.BICUBIC)
    assert result.getchannel("A").tobytes() == alpha.tobytes()


def test_the_rotation_in_exif_is_applied(tmp_path: Path) -> None:
    picture = photo(20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    read = read_photo(saved(tmp_path / "turned.png", picture, exif=exif))
    assert read.size == (10, 20)
    assert (levels(read) == np.asarray(picture.transpose(Image.Transpose.ROTATE_270))).all()


def test_one_pixel(tmp_path: Path) -> None:
    read = read_photo(saved(tmp_path / "dot.png", Image.new("RGB", (1, 1), GREEN)))
    assert levels(read).tolist() == [[list(GREEN)]]


def test_the_colour_profile_travels_with_rgb_values(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_photo(saved(tmp_path / "a.png", photo(), icc_profile=profile)).icc == profile
    assert read_photo(saved(tmp_path / "b.png", photo())).icc is None


def test_a_photo_beyond_pillows_own_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "large.png", photo(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_photo(path).size == (64, 64)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_photo_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the header: the 10 gigapixels of this file are never decoded."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    data.seek(0, io.SEEK_END)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")):
        data.write(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))
    (tmp_path / "giant.png").write_bytes(data.getvalue())
    monkeypatch.setattr("seesr_core.runtime.memory.available_memory", lambda device=None: 8_000_000_000)
    with pytest.raises(
        ResourceError, match=r"giant\.png \(100000×100000 pixels\) needs about 160\.0 GB .* 8\.0 GB are"
    ):
        read_photo(tmp_path / "giant.png")
