"""Pictures of what acts where: colours, names and frames lie where they should."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from PIL import Image

from seesr_core.pictures.overlay import _parted, colour, draw_regions, draw_tiles


def grey(width: int = 600, height: int = 520) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def test_a_region_has_its_colour_and_the_rest_stays() -> None:
    maps = torch.zeros(1, 520, 600)
    maps[:, 300:, :300] = 1.0
    shown = np.asarray(draw_regions(grey(), maps, ["cat"])).astype(int)
    inside, wanted = shown[400, 150], np.array(colour(0))
    assert np.abs(inside - (0.45 * 128 + 0.55 * wanted)).max() <= 1
    assert (shown[:250, 400:] == 128).all()
    assert (shown[300:330, :60] == wanted).all(-1).sum() > 100, "the plate behind the name, at the map's peak"


def test_names_of_tags_at_one_place_do_not_cover_each_other() -> None:
    maps = torch.zeros(4, 520, 600)
    maps[:, 515, 595] = 1.0
    shown = np.asarray(draw_regions(grey(), maps, ["a", "b", "c", "d"])).astype(int)
    rows = [np.flatnonzero((shown == np.array(colour(n))).all(-1).sum(1) > 5) for n in range(4)]
    assert all(len(own) for own in rows)
    spans = sorted((own.min(), own.max()) for own in rows)
    assert all(before[1] < after[0] for before, after in pairwise(spans))


def test_small_photos_are_enlarged_so_that_names_can_be_read() -> None:
    assert max(draw_regions(grey(48, 32), torch.zeros(0, 32, 48), []).size) == 512


def test_frames_end_in_the_middle_of_overlaps() -> None:
    boxes = [(0, 0, 100, 80), (80, 0, 180, 80), (0, 60, 100, 140), (80, 60, 180, 140)]
    assert _parted(boxes) == [(0, 0, 90, 70), (90, 0, 180, 70), (0, 70, 90, 140), (90, 70, 180, 140)]
    assert _parted([(0, 0, 50, 40)]) == [(0, 0, 50, 40)]


def test_tiles_show_their_words_in_their_frames() -> None:
    boxes = [(0, 0, 330, 520), (270, 0, 600, 520)]
    shown = np.asarray(draw_tiles(grey(), boxes, ["food", "cat, " * 200])).astype(int)
    first, second = ((shown == np.array(colour(n))).all(-1) for n in (0, 1))
    assert first[:, :300].sum() > 500
    assert not first[:, 300:].any()
    assert second[:, 300:].sum() > 5000
    assert not second[:, :300].any()
