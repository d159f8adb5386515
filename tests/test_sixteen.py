"""Sixteen bits a channel: read with every bit, written with every bit, and kept through the finish."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from seesr_core.errors import ImageError
from seesr_core.method.color import ColorFix
from seesr_core.pictures import sixteen, sizes
from seesr_core.pictures.metadata import Metadata
from seesr_core.pictures.reading import InputPhoto, read_photo
from seesr_core.pictures.writing import save_sixteen

from .test_bad_input_photos import png


def levels(channels: int, seed: int = 0) -> sixteen.Levels:
    return np.random.default_rng(seed).integers(0, 65536, (7, 5, channels)).astype(np.uint16)


def whole(read: InputPhoto) -> np.ndarray:
    """Colours and alpha of a photo that was read."""
    assert read.levels is not None
    return read.levels if read.alpha_levels is None else np.concatenate([read.levels, read.alpha_levels[..., None]], -1)


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_every_bit_is_read(tmp_path: Path, colour_type: int, channels: int) -> None:
    """From a PNG with unfiltered rows, as the test writes it."""
    values = levels(channels)
    (tmp_path / "deep.png").write_bytes(png(values, colour_type))
    assert np.array_equal(whole(read_photo(tmp_path / "deep.png")), values)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_bit_is_written(tmp_path: Path, suffix: str, channels: int) -> None:
    """Pillow reads the high bytes of what was written, and we all."""
    values, path = levels(channels), tmp_path / f"deep{suffix}"
    save_sixteen(path, values)
    found = whole(read_photo(path))
    expected = values[..., (0, 0, 0, 1)] if (suffix, channels) == (".tif", 2) else values
    assert np.array_equal(found, expected)
    with Image.open(path) as image:
        assert image.size == (5, 7)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_grey_tiffs_of_others(tmp_path: Path, compression: str) -> None:
    values = levels(1)
    Image.fromarray(values[..., 0]).save(tmp_path / "grey.tif", compression=compression)
    assert np.array_equal(whole(read_photo(tmp_path / "grey.tif")), values)


def test_turned_upright(tmp_path: Path) -> None:
    """All bits are turned as the 8 are."""
    values = levels(3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "turned.png"
    save_sixteen(path, values, metadata=Metadata(exif=exif))
    read = read_photo(path)
    assert np.array_equal(whole(read), np.rot90(values, k=-1))
    assert read.size == (7, 5)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_goes_beside_the_pixels(tmp_path: Path, suffix: str) -> None:
    icc, path = b"\0" * 132, tmp_path / f"deep{suffix}"
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Somebody"
    save_sixteen(path, levels(3), icc=icc, metadata=Metadata(exif=exif, dpi=(300.0, 300.0)))
    with Image.open(path) as image:
        assert image.info["icc_profile"] == icc
        assert image.info["dpi"][0] == pytest.approx(300, abs=0.01)
        assert image.getexif()[ExifTags.Base.Artist] == "Somebody"


def test_formats_of_8_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"JPEG holds 8 bits a channel; choose \.png or \.tif, or --depth 8"):
        save_sixteen(tmp_path / "deep.jpg", levels(3))


@pytest.mark.parametrize("fix", ["none", "adain", "wavelet"])
@pytest.mark.parametrize("size", [(24, 16), (60, 5)])
def test_the_finish_agrees_with_that_of_8_bits(fix: ColorFix, size: tuple[int, int]) -> None:
    """The same picture within two levels of 8 bits, which are cut and resized in steps; but with finer ones."""
    generator = np.random.default_rng(1)
    photo = generator.integers(60, 200, (size[1], size[0], 3)).astype(np.uint8)
    prepared = sizes.prepare(Image.fromarray(photo), scale=2, min_size=32)
    decoded = torch.from_numpy(generator.random((3, prepared.height, prepared.width), dtype=np.float32))
    fine = sixteen.finish(decoded, photo.astype(np.uint16) * np.uint16(257), scale=2, min_size=32, fix=fix)
    coarse = sizes.finish(sizes.to_u8(decoded), prepared, lr_size=size, scale=2, color_fix=fix)
    assert fine.shape == (2 * size[1], 2 * size[0], 3)
    assert np.abs(fine / 257 - np.asarray(coarse)).max() <= 2
    assert len(np.unique(fine)) > 256


def test_a_faint_slope_keeps_its_steps() -> None:
    """What 8 bits cannot hold: a slope of two levels across the picture, in several hundred steps."""
    slope = np.round(np.linspace(30000, 30514, 64)).astype(np.uint16)[None, :, None].repeat(16, 0)
    flat = torch.full((3, 32, 128), 0.5)
    found = sixteen.finish(flat, slope, scale=2, min_size=32, fix="wavelet")
    middle = found[16, :, 0].astype(int)
    assert (np.diff(middle) >= 0).all()
    assert len(np.unique(middle)) > 100
    assert abs(int(middle[64]) - 30257) < 30


def test_grey_and_alpha_of_a_result() -> None:
    colours = np.full((4, 6, 3), (10000, 20000, 30000), np.uint16)
    alpha = np.full((2, 3), 40000, np.uint16)
    assert sixteen.like(colours, grey=False, alpha_HW=alpha)[0, 0].tolist() == [10000, 20000, 30000, 40000]
    grey = round(0.299 * 10000 + 0.587 * 20000 + 0.114 * 30000)
    assert sixteen.like(colours, grey=True, alpha_HW=None)[0, 0].tolist() == [grey]
