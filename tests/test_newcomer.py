"""The whole way of a newcomer with small networks: the commands of `tools.newcomer`, each in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tools.newcomer import SMALL_SIDE, walk


@pytest.mark.slow
def test_from_download_to_a_large_picture(tmp_path: Path) -> None:
    steps = {taken.title.split("`")[1]: taken for taken in walk(tmp_path, small=True)}
    assert list(steps) == [
        "download",
        "convert",
        "inspect seesr.safetensors",
        "inspect dape.safetensors",
        "doctor",
        "upscale",
    ]
    assert "bit for bit" in steps["convert"].output
    assert "0 problems" in steps["doctor"].output
    assert steps["download"].left > steps["inspect dape.safetensors"].left > 0
    assert all(0 < taken.peak < 4e9 and taken.seconds > 0 for taken in steps.values())
    with Image.open(tmp_path / "large.png") as picture:
        assert picture.size == (4 * SMALL_SIDE, 4 * SMALL_SIDE)
