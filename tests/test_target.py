"""Wished sizes in words."""

from __future__ import annotations

import pytest
from PIL import Image

from seesr_core.errors import SettingsError
from seesr_core.pictures.target import TargetSize
from seesr_core.settings import PRESETS, UpscaleSettings


@pytest.mark.parametrize(
    ("text", "photo", "expected"),
    [
        ("3840", (640, 480), (3840, 2880)),
        ("4k", (480, 641), (2876, 3840)),
        ("8K", (200, 100), (7680, 3840)),
        ("1080p", (333, 1000), (1080, 3243)),
        ("12MP", (400, 300), (4000, 3000)),
        ("0.5 mp", (1000, 500), (1000, 500)),
        ("1920x1080", (640, 480), (1440, 1080)),
        ("1920×1080 fit", (1000, 300), (1920, 576)),
        ("1920x1080 crop", (640, 480), (1920, 1080)),
        ("1920x1080:crop", (1000, 300), (1920, 1080)),
        ("100", (400, 300), (100, 75)),
    ],
)
def test_sizes_of_results(text, photo, expected):
    settings = UpscaleSettings(to=text)
    assert settings.result_size(photo) == expected
    whole = Image.new("RGB", UpscaleSettings(scale=settings.for_photo(photo).scale).result_size(photo))
    assert settings.cut(whole).size == expected


def test_a_crop_keeps_the_middle():
    target = TargetSize.parse("100x50 crop")
    assert target.box((100, 80)) == (0, 15, 100, 65)
    assert target.box((130, 50)) == (15, 0, 115, 50)


@pytest.mark.parametrize("text", ["big", "0", "4 k", "-5", "1920x", "0x5", "12 m", "1920x1080 stretch", "1.5"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SettingsError, match=r"is no size: expected a longer side \(3840, 4k, 8k\)"):
        UpscaleSettings(to=text)


def test_a_size_beyond_the_largest_scale_is_refused():
    with pytest.raises(SettingsError, match="scale must be from"):
        UpscaleSettings(to="8k").for_photo((10, 10))


def test_presets_are_whole_and_valid():
    assert UpscaleSettings(**UpscaleSettings.preset("paper")) == UpscaleSettings()
    for name in PRESETS:
        UpscaleSettings(**UpscaleSettings.preset(name))
    with pytest.raises(SettingsError, match="Unknown preset 'best': choose one of paper, fast, turbo"):
        UpscaleSettings.preset("best")
