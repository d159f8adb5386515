"""The embedded small model: what ships, and that it upscales a photo better than it came."""

import json

import numpy as np
import pytest
from PIL import Image

from seesr_core.__main__ import main
from seesr_core.formats.tensorfile import read_header
from seesr_core.model_files import NANO_FOLDER
from seesr_core.models import load_models
from trainer.nano.build import BASE, CONTROL, DAPE_FILE

FILES = (BASE, DAPE_FILE, CONTROL)
EXAMPLE = NANO_FOLDER / "example.jpg"


def test_all_files_together_stay_small():
    assert sum((NANO_FOLDER / name).stat().st_size for name in FILES) <= 48e6


def test_the_card_and_the_attributions_ship():
    card = (NANO_FOLDER / "README.md").read_text("utf-8")
    for word in ("Data", "Licence", "Recipe", "Hardware", "Figures", "Limits"):
        assert word in card
    lines = (NANO_FOLDER / "ATTRIBUTIONS.tsv").read_text("utf-8").splitlines()
    assert len(lines) > 1000
    assert all(line.count("\t") == 2 for line in lines)


def test_parts_fit_and_bring_their_defaults():
    models = load_models()
    assert models.defaults["steps"] > 0
    assert models.vocabulary.tags_zh
    assert models.dape.config.num_tags == len(models.vocabulary)


@pytest.fixture(scope="module")
def upscaled(tmp_path_factory) -> tuple[Image.Image, dict]:
    folder = tmp_path_factory.mktemp("example")
    assert main(["upscale", str(EXAMPLE), str(folder / "large.png"), "--json", str(folder / "report.json")]) == 0
    return Image.open(folder / "large.png"), json.loads((folder / "report.json").read_text("utf-8"))


def test_the_example_comes_out_four_times_larger(upscaled):
    image, report = upscaled
    assert image.size == tuple(4 * side for side in Image.open(EXAMPLE).size)
    assert max(phase["peak_bytes"] for phase in report["phases"]) < 2e9
    assert report["tags"]


def test_the_example_loses_its_grain_and_gains_firm_edges(upscaled):
    image, _ = upscaled
    bicubic = Image.open(EXAMPLE).resize(image.size, Image.Resampling.BICUBIC)
    (flat, edge), (bicubic_flat, bicubic_edge) = (_gradients(picture) for picture in (image, bicubic))
    assert flat < 0.85 * bicubic_flat
    assert edge > 1.3 * bicubic_edge


def test_the_example_keeps_its_content(upscaled):
    image, _ = upscaled
    bicubic = Image.open(EXAMPLE).resize(image.size, Image.Resampling.BICUBIC)
    error = np.mean((_gray(image) - _gray(bicubic)) ** 2)
    assert 10 * np.log10(255**2 / error) > 25


def _gradients(picture: Image.Image) -> np.ndarray:
    """The median steepness (grain, mostly) and that of the steepest thousandth (edges), in grey levels per pixel."""
    gray = _gray(picture)
    steepness = np.hypot(np.diff(gray, axis=0)[:, :-1], np.diff(gray, axis=1)[:-1])
    return np.percentile(steepness, [50, 99.9])


def _gray(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), dtype=np.float64)


@pytest.mark.parametrize("name", FILES)
def test_no_path_of_the_training_machine_is_in_the_files(name):
    metadata = read_header(NANO_FOLDER / name).metadata
    for field in ("source", "base", "recipe", "info"):
        assert "/" not in metadata.get(field, "")
