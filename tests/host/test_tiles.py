"""Tiles around a host model: conditionings, ControlNets, interruption; the networks are simple functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .locate import plugin
from .nets import LATENT_CHANNELS, nano_model
from .sampling import (
    ddpm,
    function_model,
    latents,
    local,
    noise,
    outputs,
    prompts,
    sample_stock,
    sample_tiled,
    sigmas,
    tokens,
)

HEIGHT, WIDTH = 13, 21
TILES = {"tile_size": 64, "overlap": 24, "sampler": None}


def both(positive: Any, negative: Any, *, batch: int = 2, function: Any = local, **options: Any) -> tuple[Tensor, ...]:
    """The untiled and the tiled result of one step and a bit."""
    model, latent = function_model(function), latents(batch, HEIGHT, WIDTH)
    levels = sigmas(model, steps=2)
    given = {**TILES, "sampler": ddpm("euler"), "prompts": (positive, negative), **options}
    stock = {key: value for key, value in given.items() if key in ("prompts", "sampler", "cfg")}
    return sample_stock(model, noise(), levels, latent, **stock), sample_tiled(model, noise(), levels, latent, **given)


def assert_same(results: tuple[Tensor, ...]) -> None:
    whole, tiled = results
    assert torch.isfinite(whole).all()
    assert whole.std() > 0.1
    assert torch.allclose(whole, tiled, rtol=0, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("options", [{}, {"tile_batch": 3}, {"tile_batch": 64}, {"overlap": 0}, {"cfg": 1.0}])
def test_texts_follow_their_images(options):
    assert_same(both([[tokens(1.0, -1.0), {}]], [[tokens(0.3), {}]], **options))


def test_the_text_of_each_image_where_there_are_fewer_texts_than_images():
    assert_same(both([[tokens(1.0, -1.0), {}]], [[tokens(0.3, 0.1, 0.2), {}]], batch=3, tile_batch=2))


@pytest.mark.parametrize("rows", [1, 2])
def test_inputs_of_the_latents_shape_are_cut(rows):
    import comfy.conds

    field = torch.randn(rows, LATENT_CHANNELS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs = {
        "field": comfy.conds.CONDNoiseShape(field),
        "number": comfy.conds.CONDConstant(7),
        "several": comfy.conds.CONDList([tokens(1.0)]),
    }

    def check(x: Tensor, c: dict[str, Any]) -> Tensor:
        assert c["number"] == 7
        assert len(c["several"][0]) == len(x)
        return local(x, c)

    entries = [[[tokens(value), {"model_conds": inputs}]] for value in (1.0, 0.2)]
    assert_same(both(*entries, tile_batch=2, function=check))


def mask(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(rows, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def left(columns: int) -> Tensor:
    part = torch.zeros(1, HEIGHT, WIDTH)
    part[..., :columns] = 1.0
    return part


REGIONS: dict[str, list[dict[str, Any]]] = {
    "soft masks": [{"mask": mask()}, {"mask": mask(seed=1), "mask_strength": 0.3, "strength": 2.0}],
    "a mask for each image": [{"mask": mask(2)}, {}],
    "halves": [{"mask": left(9)}, {"mask": 1 - left(9)}],
    "areas": [{"area": (13, 12, 0, 0)}, {"area": (13, 12, 0, 9)}],
    "an area over a background": [{"area": (5, 6, 4, 7), "strength": 3.0}, {}],
    "an area of a share": [{"area": ("percentage", 0.5, 0.5, 0.3, 0.4)}, {}],
    "a mask with bounds": [{"mask": left(4), "set_area_to_bounds": True}, {}],
    "area and mask": [{"area": (9, 12, 2, 3), "mask": mask()}, {}],
    "an area that overhangs": [{"area": (64, 64, 6, 6)}, {}],
    "default": [{"mask": left(9)}, {"default": True}],
}


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("tile_batch", [1, 4])
def test_masks_and_areas(name, tile_batch):
    positive = [[tokens(value), dict(region)] for value, region in zip((1.0, -2.0), REGIONS[name], strict=True)]
    assert_same(both(positive, [[tokens(0.3), {}]], tile_batch=tile_batch))


def test_conditionings_that_weigh_nothing_in_a_tile_are_not_computed():
    rows = []

    def counted(x: Tensor, c: dict[str, Any]) -> Tensor:
        rows.append(len(x))
        return local(x, c)

    # The first acts on the leftmost tiles only, the second (which gets a negative counterpart) on the rightmost.
    positive = [[tokens(1.0), {"mask": left(4)}], [tokens(2.0), {"area": (13, 4, 0, 17)}], [tokens(0.0), {}]]
    model = function_model(counted)
    given = {**TILES, "sampler": ddpm("euler"), "overlap": 0, "prompts": (positive, [[tokens(0.3), {}]])}
    sample_tiled(model, noise(), sigmas(model, steps=1), latents(1, HEIGHT, WIDTH), **given)
    assert rows == [3, 3, 2, 2, 4, 4]


class HintNet(torch.nn.Module):
    """A ControlNet that passes its hint on."""

    dtype = torch.float32

    def forward(self, x: Tensor, hint: Tensor, **_: Any) -> dict[str, list[Tensor]]:
        assert hint.shape[-2:] == tuple(8 * side for side in x.shape[-2:])
        return {"output": [avg_pool2d(hint.mean(1, keepdim=True), 8).expand(-1, LATENT_CHANNELS, -1, -1).contiguous()]}


class HintAdapter(torch.nn.Module):
    """A T2I adapter that passes its hint on."""

    unshuffle_amount = 8

    def forward(self, hint: Tensor) -> dict[str, list[Tensor]]:
        return {"input": [avg_pool2d(hint[:, :1], 8).expand(-1, LATENT_CHANNELS, -1, -1)]}


def control_net(hint: Tensor, strength: float = 1.0, window: tuple[float, float] = (0.0, 1.0)) -> Any:
    import comfy.controlnet

    cpu = torch.device("cpu")
    return comfy.controlnet.ControlNet(HintNet(), load_device=cpu).set_cond_hint(hint, strength, window)


def adapter(hint: Tensor) -> Any:
    import comfy.controlnet

    built = comfy.controlnet.T2IAdapter(HintAdapter(), 3, 8, "nearest-exact", device=torch.device("cpu"))
    return built.set_cond_hint(hint, 0.7)


def hint(batch: int = 1, factor: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, factor * HEIGHT, factor * WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tile_batch", [1, 3])
def test_hints_of_a_chain_are_cut(rows, tile_batch):
    """A ControlNet, a T2I adapter before it and one with a hint of another size before that."""
    chain = control_net(hint(rows), 1.5)
    chain.set_previous_controlnet(adapter(hint(rows, seed=1)))
    chain.previous_controlnet.set_previous_controlnet(control_net(hint(rows, factor=4, seed=2), window=(0.0, 0.6)))
    links = [chain, chain.previous_controlnet, chain.previous_controlnet.previous_controlnet]
    before = [link.cond_hint_original for link in links]
    positive, negative = ([[tokens(value), {"control": chain}]] for value in (1.0, 0.2))
    assert_same(both(positive, negative, tile_batch=tile_batch))
    assert all(link.cond_hint_original is kept for link, kept in zip(links, before, strict=True))
    assert all(link.cond_hint is None for link in links)


def test_hints_that_an_aborted_run_left_behind_are_not_used():
    """The host drops what ControlNets cached only at the end of a run."""
    fresh, used = control_net(hint()), control_net(hint())
    for control in (fresh, used):
        control.set_previous_controlnet(adapter(hint(seed=1)))
    used.cond_hint = used.previous_controlnet.cond_hint = torch.zeros(2, 3, 64, 64)
    used.previous_controlnet.control_input = {"input": [torch.zeros(2, LATENT_CHANNELS, 8, 8)]}
    model, latent = function_model(local), latents(2, HEIGHT, WIDTH)
    levels = sigmas(model, steps=1)
    results = []
    for control in (fresh, used):
        given = tuple([[tokens(value), {"control": control}]] for value in (1.0, 0.2))
        results.append(sample_tiled(model, noise(), levels, latent, **{**TILES, "sampler": ddpm(), "prompts": given}))
    assert torch.equal(*results)


def test_a_control_shared_by_both_prompts_is_one_call_per_tile():
    rows = []

    def counted(x: Tensor, c: dict[str, Any]) -> Tensor:
        rows.append(len(x))
        return local(x, c)

    model, latent = function_model(counted), latents(1, 8, 20)
    control = control_net(torch.rand(1, 3, 64, 160))
    given = tuple([[tokens(value), {"control": control}]] for value in (1.0, 0.2))
    sample_tiled(model, noise(), sigmas(model, steps=1), latent, prompts=given, overlap=0)
    assert rows == [2, 2, 2]


def test_a_hint_covers_the_picture_also_under_an_area():
    """What the network of an area sees of the hint is what lies under the area."""
    control = control_net(hint())
    positive = [[tokens(1.0), {"area": (13, 10, 0, 0), "control": control}], [tokens(0.0), {}]]
    model = function_model(local)
    levels = sigmas(model, steps=1)
    given = {**TILES, "sampler": ddpm("euler"), "cfg": 1.0, "overlap": 0}
    latent = latents(1, HEIGHT, WIDTH)
    tiled = sample_tiled(model, noise(), levels, latent, prompts=(positive, [[tokens(0.0), {}]]), **given)
    plain = [[tokens(1.0), {"area": (13, 10, 0, 0)}], [tokens(0.0), {}]]
    without = sample_tiled(model, noise(), levels, latent, prompts=(plain, [[tokens(0.0), {}]]), **given)
    expected = 0.5 * avg_pool2d(hint().mean(1, keepdim=True), 8)  # averaged with the conditioning that has no hint
    assert torch.allclose(
        ((tiled - without) * 0.18215)[..., :2], expected[..., :2].expand(-1, LATENT_CHANNELS, -1, -1), atol=1e-4
    )


@pytest.mark.parametrize(("window", "layout"), [("reference", "published"), ("symmetric", "balanced")])
@pytest.mark.parametrize(("height", "width"), [(13, 21), (6, 40)])
def test_a_network_that_notices_tiles_gives_what_the_cores_tiled_denoiser_gives(height, width, window, layout):
    """Averaging clean latents here is averaging eps there."""

    def global_eps(x: Tensor, guidance: float) -> Tensor:
        ramp = torch.linspace(-1, 1, x.shape[-1]) + torch.linspace(-2, 1, x.shape[-2])[:, None]
        return guidance * x.mean(dim=(1, 2, 3), keepdim=True) + 0.1 * x + ramp

    model, latent = nano_model(), latents(2, height, width)
    levels = sigmas(model, steps=1)
    sigma = float(levels[0])

    def denoised(x: Tensor, c: dict[str, Any]) -> Tensor:
        guidance = c["c_crossattn"].mean(dim=(1, 2))[:, None, None, None]
        return x - sigma * global_eps(x / (1 + sigma**2) ** 0.5, guidance)

    given = ([[tokens(1.0), {}]], [[tokens(0.5), {}]])
    options = {**TILES, "sampler": ddpm("euler"), "prompts": given, "window": window, "layout": layout, "tile_batch": 2}
    tiled = sample_tiled(function_model(denoised, model), noise(), levels, latent, **options)

    tiling = plugin("seesr_core.tiling.grid")
    core = tiling.TiledDenoiser(
        denoise=lambda x, t, tiles=None: 3.0 * global_eps(x, 1.0) - 2.0 * global_eps(x, 0.5),
        tile=8,
        overlap=3,
        window=window,
        layout=layout,
    )
    start = latent["samples"] * 0.18215 + sigma * noise().generate_noise(latent)
    expected = (start - sigma * core(start / (1 + sigma**2) ** 0.5, 1)) / 0.18215
    assert torch.allclose(tiled, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_tiles_that_cover_the_image_change_no_bit():
    model, latent = nano_model(), latents(1, 8, 16)
    levels = sigmas(model, steps=2)
    patched = outputs(plugin("nodes.tiled").SeeSRTileModel.execute(model, tile_size=128, overlap=0))[0]
    whole = sample_stock(model, noise(), levels, latent)
    assert torch.equal(sample_stock(patched, noise(), levels, latent), whole)
    assert torch.equal(sample_tiled(model, noise(), levels, latent, tile_size=128), whole)
    tiled = sample_tiled(model, noise(), levels, latent)
    assert not torch.equal(tiled, whole)
    assert torch.equal(sample_stock(model, noise(), levels, latent), whole)  # and the model is as it was


def test_the_patch_makes_the_hosts_sampler_the_tiled_sampler():
    model, latent = nano_model(), latents(1, 8, 16)
    levels = sigmas(model, steps=1)
    make = plugin("nodes.tiled").SeeSRTileModel.execute
    patched = outputs(make(outputs(make(model, tile_size=512))[0], tile_size=64, overlap=16))[0]
    assert torch.equal(sample_stock(patched, noise(), levels, latent), sample_tiled(model, noise(), levels, latent))


def test_an_interrupt_stops_within_a_tile_and_leaves_nothing_behind():
    import comfy.model_management

    calls = []

    def interrupted(x: Tensor, c: dict[str, Any]) -> Tensor:
        calls.append(len(x))
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing(True)
        return local(x, c)

    control = control_net(torch.rand(1, 3, 64, 320))
    given = tuple([[tokens(value), {"control": control}]] for value in (1.0, 0.2))
    model, latent = function_model(interrupted), latents(1, 8, 40)
    levels = sigmas(model, steps=3)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample_tiled(model, noise(), levels, latent, prompts=given, overlap=0)
    assert len(calls) == 3
    assert control.cond_hint is None
    again = sample_tiled(model, noise(), levels, latent, prompts=given, overlap=0)
    fresh = sample_tiled(function_model(local), noise(), levels, latent, prompts=given, overlap=0)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((60, 0), "tile_size must be a multiple of 8 and at least 64 pixels, not 60"),
        ((56, 0), "at least 64 pixels, not 56"),
        ((100, 0), "multiple of 8"),
        ((64, 12), "overlap must be a multiple of 8"),
        ((64, -8), "overlap must be a multiple of 8"),
        ((64, 64), r"overlap \(64 pixels\) must be less than tile_size \(64 pixels\)"),
    ],
)
def test_impossible_tiles_are_refused(given, match):
    error = plugin("seesr_core.errors").SettingsError
    with pytest.raises(error, match=match):
        plugin("nodes.tiled").SeeSRTileModel.execute(nano_model(), *given)


@pytest.mark.parametrize(("given", "match"), [({"tile_batch": -1}, "tile_batch"), ({"window": "square"}, "symmetric")])
def test_impossible_options_are_refused(given, match):
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match=match):
        plugin("nodes.tiled").SeeSRTileModel.execute(nano_model(), **given)


def test_prompts_of_the_real_network_are_batched_in_one_call_per_tile():
    model = nano_model()
    rows = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    sample_tiled(model, noise(), sigmas(model, steps=1), latents(1, 8, 16), prompts=prompts(), overlap=0)
    hook.remove()
    assert rows == [2, 2]
