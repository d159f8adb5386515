"""`upscale --frames all` and `--depth`: animations and pages whole, sixteen bits kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from seesr_core.pictures.reading import read_photo
from seesr_core.pictures.writing import save_sixteen

from ..tiny_model import photo
from .command import names, refusal, run

DURATIONS = [100, 200, 300]
AVIF = pytest.param(".avif", marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF"))


def film(path: Path) -> Path:
    frames = [photo(16, 12, seed=i) for i in (1, 2, 1)]
    timing: dict[str, Any] = {} if path.suffix == ".tif" else {"duration": DURATIONS, "loop": 2}
    frames[0].save(path, save_all=True, append_images=frames[1:], **timing)
    return path


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif", AVIF])
def test_frame_by_frame_into_the_same_kind(model: Path, tmp_path: Path, suffix: str) -> None:
    """As many frames, as long, each four times larger; equal frames give equal results, as they share the seed."""
    (tmp_path / "in").mkdir()
    source = film(tmp_path / "in" / f"film{suffix}")
    assert run(model, tmp_path / "in", tmp_path / "out", "--frames", "all", "--steps", 2) == 0
    assert names(tmp_path / "out") == [source.name]
    with Image.open(tmp_path / "out" / source.name) as result, Image.open(source) as given:
        assert (result.format, result.n_frames) == (given.format, 3)
        pictures = []
        for frame in range(3):
            result.seek(frame)
            given.seek(frame)
            pictures.append(np.asarray(result.convert("RGB")).astype(int))
            assert result.info.get("duration") == (None if suffix == ".tif" else DURATIONS[frame])
        assert result.info.get("loop") == given.info.get("loop")
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    assert np.abs(pictures[0] - pictures[2]).mean() < 1.5
    assert np.abs(pictures[0] - pictures[1]).mean() > 5


def test_each_frame_is_what_it_is_alone(model: Path, tmp_path: Path) -> None:
    source = film(tmp_path / "pages.tif")
    assert run(model, source, tmp_path / "all.tif", "--frames", "all", "--steps", 2) == 0
    assert run(model, source, tmp_path / "one.tif", "--frame", 1, "--steps", 2) == 0
    with Image.open(tmp_path / "all.tif") as pages, Image.open(tmp_path / "one.tif") as one:
        pages.seek(1)
        assert np.array_equal(np.asarray(pages), np.asarray(one))


def test_photos_beside_an_animation_stay_photos(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "in"
    place.mkdir()
    film(place / "film.gif")
    photo(8, 8).save(place / "a.jpg")
    photo(8, 8).save(place / "still.gif")
    assert run(model, place, tmp_path / "out", "--frames", "all", "--steps", 1) == 0
    assert names(tmp_path / "out") == ["a.png", "film.gif", "still.png"]


def test_what_cannot_go_together(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = film(tmp_path / "film.gif")
    both = refusal(model, capfd, source, tmp_path / "a.gif", "--frames", "all", "--frame", "1", code=2)
    assert "give one of them" in both
    deep = refusal(model, capfd, source, tmp_path / "a.png", "--frames", "all", "--depth", "16", code=2)
    assert "8 bits a channel" in deep
    assert "JPEG holds one picture" in refusal(model, capfd, source, tmp_path / "a.jpg", "--frames", "all")
    photo(8, 8).save(tmp_path / "photo.png")
    assert "GIF holds 256 colours" in refusal(model, capfd, tmp_path / "photo.png", tmp_path / "a.gif")


def deep_photo(path: Path, channels: int) -> np.ndarray:
    slope = np.linspace(20000, 24000, 20).astype(np.uint16)
    values = (
        slope[None, :, None] + np.arange(channels, dtype=np.uint16) * np.uint16(5000) + np.zeros((16, 1, 1), np.uint16)
    )
    save_sixteen(path, values)
    return values


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_come_back(model: Path, tmp_path: Path, suffix: str, channels: int) -> None:
    """Colours, grey and alpha; the colours are the photo's, which 8 bits hold in 16 levels."""
    values = deep_photo(tmp_path / f"deep{suffix}", channels)
    out = tmp_path / f"out{suffix}"
    assert run(model, tmp_path / f"deep{suffix}", out, "--steps", 2, "--color-fix", "adain") == 0
    result = read_photo(out)
    assert result.levels is not None
    assert result.levels.shape == (64, 80, min(channels, 3))
    means = result.levels.reshape(-1, min(channels, 3)).mean(0)
    assert np.abs(means - values[..., :3].reshape(-1, min(channels, 3)).mean(0)).max() < 100
    assert len(np.unique(result.levels[..., 0])) > 500
    if channels == 4:
        assert result.alpha_levels is not None
        assert np.abs(result.alpha_levels[32, ::4].astype(int) - values[8, :, 3]).max() < 200


@pytest.mark.parametrize(("options", "sixteen"), [((), False), (("--depth", "16"), True), (("--depth", "8"), False)])
def test_depth_of_an_ordinary_photo(
    model: Path, source: Path, tmp_path: Path, options: tuple[str, ...], sixteen: bool
) -> None:
    assert run(model, source, tmp_path / "out.png", "--steps", 2, *options) == 0
    assert run(model, source, tmp_path / "plain.png", "--steps", 2) == 0
    result, plain = read_photo(tmp_path / "out.png"), read_photo(tmp_path / "plain.png")
    assert (result.levels is not None) == sixteen
    # The tiny model's faint picture is stretched by the colour fix, and its rounding with it.
    assert np.abs(np.asarray(result.rgb).astype(int) - np.asarray(plain.rgb)).mean() <= (1 if sixteen else 0)


def test_depth_8_of_a_deep_photo_and_formats_of_8_bits(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deep_photo(tmp_path / "deep.png", 3)
    assert run(model, tmp_path / "deep.png", tmp_path / "flat.png", "--steps", 1, "--depth", "8") == 0
    assert read_photo(tmp_path / "flat.png").levels is None
    assert run(model, tmp_path / "deep.png", tmp_path / "flat.jpg", "--steps", 1) == 0
    capfd.readouterr()
    assert "JPEG holds 8 bits" in refusal(model, capfd, tmp_path / "deep.png", tmp_path / "b.jpg", "--depth", "16")
