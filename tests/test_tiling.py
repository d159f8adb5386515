"""Tile geometry, blending windows, and the tiled denoiser."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from seesr_core.errors import SettingsError
from seesr_core.tiling.grid import (
    Blend,
    Tile,
    TiledDenoiser,
    balanced_grid,
    fits_one_tile,
    gaussian_window,
    lay_out,
    tile_grid,
    tile_offsets,
)


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "expected"),
    [
        (72, 24, 4, [0, 20, 40, 48]),
        (40, 24, 4, [0, 16]),
        (44, 24, 4, [0, 20]),
        (24, 24, 4, [0]),
        (25, 24, 4, [0, 1]),
        (10, 24, 4, [0]),
        (12, 4, 0, [0, 4, 8]),
        (6, 4, 3, [0, 1, 2]),
    ],
)
def test_tile_offsets(size, tile, overlap, expected):
    assert tile_offsets(size, tile, overlap) == expected


@pytest.mark.parametrize(("height", "width"), [(40, 72), (20, 60), (60, 20), (3, 200), (97, 96), (1, 50)])
@pytest.mark.parametrize(("tile", "overlap"), [(24, 4), (24, 23), (16, 0), (5, 2)])
def test_a_grid_covers_the_latent_with_equal_tiles_inside(height, width, tile, overlap):
    covered = torch.zeros(height, width)
    for part in tile_grid(height, width, tile, overlap):
        assert part.height == part.width == min(tile, height, width)
        view = part.crop(covered)
        assert view.shape == (part.height, part.width)
        view += 1
    assert covered.min() >= 1


@pytest.mark.parametrize(("height", "width"), [(40, 72), (20, 60), (60, 20), (3, 200), (97, 96), (1, 50), (128, 128)])
@pytest.mark.parametrize(("tile", "overlap"), [(24, 4), (24, 23), (16, 0), (5, 2), (96, 4)])
def test_a_balanced_grid_covers_the_latent_with_as_few_equal_tiles(height, width, tile, overlap):
    grid = balanced_grid(height, width, tile, overlap)
    covered = torch.zeros(height, width)
    for part in grid:
        assert (part.height, part.width) == (grid[0].height, grid[0].width)
        assert part.height <= min(tile, height)
        assert part.width <= min(tile, width)
        part.crop(covered).add_(1)
    assert covered.min() >= 1
    for starts, length in (({t.y for t in grid}, grid[0].height), ({t.x for t in grid}, grid[0].width)):
        assert all(after - before <= length - overlap for before, after in pairwise(sorted(starts)))
    if min(height, width) < tile:
        return  # the published tiles shrink with the shorter side
    published = tile_grid(height, width, tile, overlap)
    assert len(grid) == len(published)
    assert len(grid) * grid[0].height * grid[0].width <= len(published) * published[0].height * published[0].width


@pytest.mark.parametrize(
    ("sides", "tile", "starts"),
    [((128, 128), (72, 72), [0, 56]), ((256, 256), (88, 88), [0, 84, 168]), ((96, 128), (96, 72), [0, 56])],
)
def test_balanced_tiles_are_multiples_of_what_the_unet_sees_as_one(sides, tile, starts):
    grid = lay_out(sides[0], sides[1], 96, 4, "balanced")
    assert {(part.height, part.width) for part in grid} == {tile}
    assert sorted({part.x for part in grid}) == starts


def test_a_latent_no_larger_than_a_tile_is_not_cut_and_an_unknown_layout_is_refused():
    assert lay_out(72, 128, 96, 4) == lay_out(72, 128, 96, 4, "balanced") == []
    with pytest.raises(SettingsError, match="published, balanced"):
        lay_out(200, 200, 96, 4, "square")  # type: ignore[arg-type]


def test_grid_runs_down_the_columns():
    assert tile_grid(6, 8, 4, 0) == [Tile(0, 0, 4, 4), Tile(2, 0, 4, 4), Tile(0, 4, 4, 4), Tile(2, 4, 4, 4)]


def test_crop_of_the_picture_under_a_tile():
    picture = torch.arange(32 * 32).view(1, 32, 32)
    assert torch.equal(Tile(1, 2, 2, 1).crop(picture, 8), picture[:, 8:24, 16:24])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Tile(0, 0, 10, 10), Tile(2, 3, 4, 5)),
        (Tile(4, 5, 10, 10), Tile(4, 5, 2, 3)),
        (Tile(3, 4, 1, 2), Tile(3, 4, 1, 2)),
        (Tile(6, 3, 4, 5), None),
        (Tile(0, 0, 2, 9), None),
    ],
)
def test_intersection(other, expected):
    tile = Tile(2, 3, 4, 5)
    assert tile.intersection(other) == other.intersection(tile) == expected


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Tile(10, 20, 3, 3), Tile(10, 20, 8, 8)),
        (Tile(17, 27, 1, 1), Tile(14, 24, 8, 8)),
        (Tile(25, 35, 1, 1), Tile(18, 28, 8, 8)),
        (Tile(12, 22, 9, 2), Tile(12, 20, 9, 8)),
    ],
)
def test_a_part_grows_but_not_out_of_its_tile(part, expected):
    within = Tile(10, 20, 16, 16)
    assert part.grown(8, within) == expected
    assert expected.intersection(part) == part
    assert part.grown(99, within) == within


def test_a_part_counted_from_a_corner():
    assert Tile(12, 25, 3, 4).relative_to(Tile(10, 20, 8, 8)) == Tile(2, 5, 3, 4)


@pytest.mark.parametrize(("height", "width", "fits"), [(8, 8, True), (4, 16, True), (8, 9, False), (1, 65, False)])
def test_a_tiles_area_decides_what_is_denoised_whole(height, width, fits):
    assert fits_one_tile(height, width, 8) is fits


def test_a_blend_of_equal_tiles_is_their_value():
    blend = Blend(torch.zeros(2, 4, 5, 7, dtype=torch.float16), Tile(0, 0, 4, 4))
    for tile in tile_grid(5, 7, 4, 1):
        blend.add(tile, torch.full((2, 4, 4, 4), 3.0, dtype=torch.float16))
    assert blend.result().dtype == torch.float32
    torch.testing.assert_close(blend.result(), torch.full((2, 4, 5, 7), 3.0))


@pytest.mark.parametrize(("tile", "overlap"), [(24, 24), (24, 25), (24, -1), (0, 0)])
def test_impossible_tiles_are_refused(tile, overlap):
    for make in (
        lambda: tile_grid(64, 64, tile, overlap),
        lambda: TiledDenoiser(denoise=whole, tile=tile, overlap=overlap),
    ):
        with pytest.raises(SettingsError, match=r"overlap|tile"):
            make()


@pytest.mark.parametrize(("option", "value"), [("tile_batch", 0), ("window", "square")])
def test_impossible_settings_are_refused(option, value):
    with pytest.raises(SettingsError, match=r"tiles per call|tile window"):
        TiledDenoiser(denoise=whole, **{option: value})


@pytest.mark.parametrize("size", [8, 9])
def test_windows(size):
    reference, symmetric = gaussian_window(size, size), gaussian_window(size, size, "symmetric")
    assert reference.dtype == symmetric.dtype == torch.float64
    torch.testing.assert_close(symmetric, symmetric.flip(0).flip(1))
    torch.testing.assert_close(reference, reference.flip(1))
    # Centred at size / 2 the rows mirror about that row, and row 0 has no partner.
    torch.testing.assert_close(reference[1:], reference[1:].flip(0))
    assert (reference[0] < reference[-1]).all()
    with pytest.raises(SettingsError, match="reference, symmetric"):
        gaussian_window(size, size, "square")  # type: ignore[arg-type]


def whole(x: Tensor, t: int, tiles=None) -> Tensor:
    return x * t


def positional(field_BCHW: Tensor):
    """Predicts the input plus the part of a fixed field under each tile, of each image of the batch."""

    def denoise(x: Tensor, t: int, tiles=None) -> Tensor:
        if tiles is None:
            return x + field_BCHW
        return x + torch.cat([tile.crop(field_BCHW) for tile in tiles])

    return denoise


@pytest.mark.parametrize("window", ["reference", "symmetric"])
@pytest.mark.parametrize("tile_batch", [1, 3, 100])
@pytest.mark.parametrize(("height", "width"), [(13, 21), (6, 40), (40, 6)])
def test_a_local_denoiser_does_not_notice_tiles(height, width, tile_batch, window):
    generator = torch.Generator().manual_seed(0)
    x, field = (torch.randn(2, 4, height, width, generator=generator) for _ in range(2))
    tiled = TiledDenoiser(denoise=positional(field), tile=8, overlap=3, tile_batch=tile_batch, window=window)
    torch.testing.assert_close(tiled(x, 5), x + field, atol=1e-5, rtol=1e-5)


def test_overlaps_are_averaged_under_the_window():
    def numbered(x: Tensor, t: int, tiles=None) -> Tensor:
        assert tiles is not None
        return torch.full_like(x, float(tiles[0].x))

    x = torch.zeros(1, 4, 4, 6)
    eps = TiledDenoiser(denoise=numbered, tile=4, overlap=2)(x, 1)
    left, right = gaussian_window(4, 4)[0, 2:].float(), gaussian_window(4, 4)[0, :2].float()
    torch.testing.assert_close(eps[0, 0, 0, 2:4], 2.0 * right / (left + right))
    assert eps[0, 0, 0, 0] == 0.0
    assert eps[0, 0, 0, 5] == 2.0


def test_a_latent_of_one_tiles_area_is_denoised_whole():
    calls: list[object] = []

    def denoise(x: Tensor, t: int, tiles=None) -> Tensor:
        calls.append(tiles)
        return x

    tiled = TiledDenoiser(denoise=denoise, tile=8, overlap=2)
    tiled(torch.zeros(1, 4, 4, 16), 1)
    assert calls == [None]
    tiled(torch.zeros(1, 4, 4, 17), 1)
    assert calls[1:] == [[Tile(0, x, 4, 4)] for x in (0, 2, 4, 6, 8, 10, 12, 13)]


def test_half_precision_tiles_are_summed_in_float32():
    x = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(0)).half()
    eps = TiledDenoiser(denoise=positional(torch.zeros_like(x)), tile=8, overlap=2)(x, 1)
    assert eps.dtype == torch.float16
    torch.testing.assert_close(eps, x, atol=1e-3, rtol=1e-3)
