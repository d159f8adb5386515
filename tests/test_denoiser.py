"""The guided prediction: order of the halves, what guidance and scales do, tiles."""

from dataclasses import replace

import torch

from seesr_core.method.denoiser import Denoiser, crop_tiles
from seesr_core.tiling.grid import Tile
from tests.small_nets import inputs, seeded_networks


def _denoiser(**changes) -> Denoiser:
    unet, control = seeded_networks()
    data = inputs()
    negative = inputs(seed=7)["text"]
    start = Denoiser(
        unet=unet,
        controlnet=control,
        positive=data["text"],
        negative=negative,
        soft_prompt=data["soft"],
        image=data["image"],
    )
    return replace(start, **changes)


def _call(denoiser: Denoiser, x=None, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return denoiser(inputs()["x"] if x is None else x, 400, **kwargs)


def test_guidance_combines_the_two_halves():
    positive, negative = _call(_denoiser(cfg=1.0)), _call(_denoiser(cfg=1.0, positive=inputs(seed=7)["text"]))
    torch.testing.assert_close(_call(_denoiser(cfg=3.0)), negative + 3.0 * (positive - negative), rtol=1e-4, atol=1e-5)


def test_without_guidance_the_network_runs_once_per_image():
    denoiser = _denoiser(cfg=1.0)
    sizes = []
    denoiser.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    _call(denoiser)
    denoiser.cfg = 2.0
    _call(denoiser)
    assert sizes == [2, 4]


def test_control_scale_zero_equals_no_controlnet():
    assert torch.equal(_call(_denoiser(control_scale=0.0)), _call(_denoiser(controlnet=None)))
    assert not torch.allclose(_call(_denoiser()), _call(_denoiser(controlnet=None)))


def test_a_tile_that_is_the_whole_picture_changes_nothing():
    whole = _call(_denoiser())
    torch.testing.assert_close(_call(_denoiser(), tiles=[Tile(0, 0, 8, 8)]), whole)


def test_tiles_are_stacked_tile_major_with_their_own_pixels():
    image = torch.arange(2 * 3 * 16 * 24).reshape(2, 3, 16, 24).float()
    tiles = [Tile(0, 0, 1, 1), Tile(1, 2, 1, 1)]
    cropped = crop_tiles(image, tiles)
    assert cropped.shape == (4, 3, 8, 8)
    assert torch.equal(cropped[1], image[1, :, :8, :8])
    assert torch.equal(cropped[2], image[0, :, 8:, 16:])


def test_two_tiles_at_once_equal_one_after_the_other():
    denoiser, x = _denoiser(image=inputs(size=16)["image"]), inputs(size=16)["x"]
    tiles = [Tile(0, 0, 8, 8), Tile(8, 8, 8, 8)]
    together = _call(denoiser, torch.cat([tile.crop(x) for tile in tiles]), tiles=tiles)
    apart = torch.cat([_call(denoiser, tile.crop(x), tiles=[tile]) for tile in tiles])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
