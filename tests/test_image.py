"""Preparation and finish of pictures, and their forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import ImageError, SettingsError
from seesr_core.method.color import color_fix
from seesr_core.pictures.sizes import (
    as_rgb,
    check_prepared,
    content_box,
    finish,
    prepare,
    prepare_size,
    resize,
    to_pil,
    to_tensor,
    to_u8,
)

from .golden import golden_dir
from .parity.groups import prep as parity


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    levels = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_parity():
    comparisons = list(parity.cases(golden_dir(), full=False))
    assert comparisons
    assert [comparison.line() for comparison in comparisons if not comparison.ok] == []


@pytest.mark.parametrize(
    ("lr", "scale", "min_size", "enlarged", "prepared", "final"),
    [
        ((128, 128), 4.0, 512, (128, 128), (512, 512), (512, 512)),
        ((129, 200), 4.0, 512, (129, 200), (512, 800), (516, 800)),
        ((49, 49), 4.0, 512, (127, 127), (504, 504), (196, 196)),
        ((64, 96), 4.0, 0, (64, 96), (256, 384), (256, 384)),
        ((64, 96), 2.0, 256, (128, 192), (256, 384), (128, 192)),
        ((100, 60), 1.5, 120, (133, 80), (200, 120), (150, 90)),
        ((33, 35), 0.5, 0, (33, 35), (16, 16), (16, 18)),
        ((1, 1), 1.0, 0, (1, 1), (8, 8), (1, 1)),
        ((20000, 50), 4.0, 512, (40000, 100), (160000, 512), (80000, 200)),
        ((64, 1), 4.0, 512, (512, 8), (2048, 512), (256, 4)),
        ((3, 300), 4.0, 512, (6, 600), (512, 2400), (12, 1200)),
        ((1000, 100), 4.0, 512, (1280, 128), (5120, 512), (4000, 400)),
        ((40, 8), 4.0, 0, (40, 8), (160, 32), (160, 32)),
    ],
)
def test_sizes(lr, scale, min_size, enlarged, prepared, final):
    sizes = prepare_size(*lr, scale=scale, min_size=min_size)
    assert (sizes.lr, sizes.enlarged, sizes.prepared, sizes.final) == (lr, enlarged, prepared, final)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"width": 0, "height": 5}, ImageError),
        ({"width": 5, "height": 5, "scale": 0.0}, SettingsError),
        ({"width": 5, "height": 5, "scale": float("nan")}, SettingsError),
        ({"width": 5, "height": 5, "scale": 1000.0}, SettingsError),
        ({"width": 5, "height": 5, "min_size": -1}, SettingsError),
    ],
)
def test_impossible_sizes_are_refused(arguments, error):
    with pytest.raises(error, match=r"expected|must"):
        prepare_size(**arguments)


@pytest.mark.parametrize(("scale", "min_size"), [(4.0, 512), (2.0, 64), (3.0, 100)])
def test_prepare_and_finish_meet_their_sizes(scale, min_size):
    photo = noise(37, 29)
    prepared = prepare(photo, scale=scale, min_size=min_size)
    assert prepared.size == prepare_size(37, 29, scale=scale, min_size=min_size).prepared
    finished = finish(to_tensor(prepared), prepared, lr_size=photo.size, scale=scale)
    assert finished.size == (round(37 * scale), round(29 * scale))


@pytest.mark.parametrize("size", [(64, 1), (1, 64), (300, 3), (90, 9), (41, 10), (16, 16)])
def test_long_thin_photos_are_padded_and_cut_out_again(size):
    """What the networks see holds the whole photo, in its proportions; with it unchanged the photo comes back."""
    prepared = prepare(noise(*size), scale=4.0)
    left, top, right, bottom = content_box(prepared.size, size, 4.0)
    assert prepared.size[0] * prepared.size[1] <= 5 * 512 * 512
    shown = prepared.crop((left, top, right, bottom))
    assert abs(shown.size[0] / shown.size[1] * size[1] / size[0] - 1) < 0.1
    assert same(finish(prepared, prepared, lr_size=size, color_fix="none"), resize(shown, (4 * size[0], 4 * size[1])))
    if bottom < prepared.size[1]:  # mirrored below its last row
        below = prepared.crop((left, bottom, right, bottom + 1))
        assert same(below, prepared.crop((left, bottom - 1, right, bottom)))


@pytest.mark.parametrize(
    ("prepared", "lr", "scale", "match"),
    [
        ((512, 512), (128, 128), 4.0, None),
        ((512, 512), (128, 128), 2.0, None),
        ((504, 504), (49, 49), 4.0, None),
        ((2048, 512), (64, 1), 4.0, None),
        ((512, 512), (256, 256), 4.0, "too few for the photo's 256×256 × 4.*same scale"),
        ((2048, 512), (300, 100), 4.0, "no enlargement of a photo of 300×100"),
        ((512, 768), (192, 128), 4.0, "no enlargement of a photo of 192×128"),
    ],
)
def test_pictures_prepared_otherwise_are_refused(prepared, lr, scale, match):
    if match is None:
        check_prepared(prepared, lr, scale)
        return
    with pytest.raises(ImageError, match=match):
        check_prepared(prepared, lr, scale)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_finish_fixes_colours_and_cuts_to_8_bits(method):
    image, prepared = noise(32, 16, 1), noise(32, 16, 2)
    finished = finish(image, prepared, lr_size=(8, 4), scale=4.0, color_fix=method)
    expected = color_fix(to_tensor(image), to_tensor(prepared), method)[0].clamp(0, 1) * 255
    assert torch.equal(torch.from_numpy(np.asarray(finished).copy()).permute(2, 0, 1), expected.byte())


def test_finish_without_colour_fix_takes_any_prepared_size():
    image = noise(32, 16)
    assert same(finish(image, noise(8, 8), lr_size=(8, 4), color_fix="none"), image)
    with pytest.raises(ImageError, match="result's size 32×16, found 8×8"):
        finish(image, noise(8, 8), lr_size=(8, 4), color_fix="adain")
    with pytest.raises(SettingsError, match="adain, wavelet, none"):
        finish(image, image, lr_size=(8, 4), color_fix="lab")  # type: ignore[arg-type]


def test_tensor_and_picture_are_inverse():
    image = noise(7, 5)
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((1, 3, 5, 7), torch.float32)
    assert same(to_pil(tensor), image)
    assert same(to_pil(tensor[0]), image)


def test_rounding():
    levels = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 1.9 / 255, 2.0])
    assert to_u8(levels).tolist() == [0, 0, 1, 2, 255]
    assert to_u8(levels, "cut").tolist() == [0, 0, 0, 1, 255]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "YCbCr"])
def test_other_modes_become_rgb(mode):
    rgb = as_rgb(Image.new("RGB", (4, 3), (200, 200, 200)).convert(mode))
    assert (rgb.mode, rgb.size) == ("RGB", (4, 3))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16 if mode == "I;16" else np.int32))
    assert grey.mode == mode
    assert np.asarray(as_rgb(grey))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("thing", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), "photo.png"])
def test_things_that_are_no_pictures(thing):
    with pytest.raises(ImageError, match="Expected a PIL picture or a uint8 array"):
        as_rgb(thing)


def test_tensors_of_several_pictures_are_refused():
    with pytest.raises(ImageError, match=r"one picture of shape \(3, H, W\), found \(2, 3, 4, 4\)"):
        to_pil(torch.zeros(2, 3, 4, 4))
