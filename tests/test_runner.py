"""Where the networks meet their inputs: pictures in 8 bits, cut to the tiles that are denoised, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seesr_core.method.denoiser import Denoiser
from seesr_core.tiling.grid import Tile
from seesr_core.tiling.runner import PlacedDenoiser
from tests.small_nets import inputs, seeded_networks

CPU = torch.device("cpu")


def _placed(size: int = 8) -> PlacedDenoiser:
    unet, control = seeded_networks()
    data = inputs(size=size)
    denoiser = Denoiser(
        unet=unet,
        controlnet=control,
        positive=data["text"],
        negative=inputs(seed=7)["text"],
        soft_prompt=data["soft"],
        image=data["image"].mul(255).round().to(torch.uint8),
    )
    return PlacedDenoiser(denoiser=denoiser, device=CPU, dtype=torch.float32)


def _call(placed: PlacedDenoiser, x: Tensor, tiles: Sequence[Tile] | None = None) -> Tensor:
    with torch.no_grad():
        return placed(x, 400, tiles)


def test_a_tile_that_is_the_whole_picture_changes_nothing() -> None:
    placed, x = _placed(), inputs()["x"]
    assert torch.equal(_call(placed, x, [Tile(0, 0, 8, 8)]), _call(placed, x))


def test_the_networks_see_the_picture_in_unit_range() -> None:
    placed = _placed()
    seen: list[Tensor] = []
    placed.denoiser.controlnet.register_forward_pre_hook(lambda _, args: seen.append(args[3]))  # type: ignore[union-attr]
    _call(placed, inputs()["x"])
    assert torch.equal(seen[0][:2], placed.denoiser.image.float() / 255)


def test_tiles_are_stacked_tile_major_with_their_own_pixels() -> None:
    placed = _placed()
    image = torch.arange(2 * 3 * 16 * 24).reshape(2, 3, 16, 24)
    placed.denoiser.image = image
    cropped = placed._pixels([Tile(0, 0, 1, 1), Tile(1, 2, 1, 1)])
    assert cropped.shape == (4, 3, 8, 8)
    assert torch.equal(cropped[1], image[1, :, :8, :8])
    assert torch.equal(cropped[2], image[0, :, 8:, 16:])


def test_two_tiles_at_once_equal_one_after_the_other() -> None:
    placed, x = _placed(size=16), inputs(size=16)["x"]
    tiles = [Tile(0, 0, 8, 8), Tile(8, 8, 8, 8)]
    together = _call(placed, torch.cat([tile.crop(x) for tile in tiles]), tiles)
    apart = torch.cat([_call(placed, tile.crop(x), [tile]) for tile in tiles])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
