"""The ControlNet with RCA as the host's own object: what it sees, what it gives, and its place in a chain."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from . import nets
from .locate import plugin


def applied(
    model: Any, inputs: dict[str, Any], *, positive: Any = None, negative: Any = None, **settings: Any
) -> tuple[Any, Any, Any]:
    """MODEL and conditionings with the ControlNet, and with no RCA in the U-Net unless `settings` says so."""
    apply = plugin("nodes.apply").apply_seesr
    return apply(
        model,
        inputs["positive"] if positive is None else [positive],
        [inputs["negative"] if negative is None else negative],
        nets.nano_seesr(),
        inputs["soft_prompt"],
        inputs["image"],
        **settings,
    )


class Calls:
    """What our ControlNet got and gave while the `with` lasts."""

    def __enter__(self) -> Calls:
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, list[Tensor]]] = []
        net = nets.nano_seesr().control.control_model
        self.handle = net.register_forward_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _note(self, _net: Any, _args: Any, kwargs: dict[str, Any], output: dict[str, list[Tensor]]) -> None:
        self.inputs.append(kwargs)
        self.outputs.append({name: [residual.clone() for residual in given] for name, given in output.items()})


def stock_control(seed: int) -> Any:
    """A ControlNet of the host's own class, for the shipped U-Net, at random."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = plugin("nodes.host.keys").host_config(nets.nano_config())
        net = comfy.cldm.cldm.ControlNet(hint_channels=3, operations=comfy.ops.manual_cast, **config)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return comfy.controlnet.ControlNet(net.requires_grad_(False).eval(), load_device=torch.device("cpu"))


def add_stock(control: Any, conditionings: tuple[Any, Any], image: Tensor) -> tuple[Any, Any]:
    """The host's own Apply ControlNet."""
    node = importlib.import_module("nodes").ControlNetApplyAdvanced
    return node().apply_controlnet(*conditionings, control, image, 1.0, 0.0, 1.0)


def test_sees_the_photo_as_it_is(model: Any, inputs: dict[str, Any]) -> None:
    with Calls() as calls:
        nets.run(*applied(model, inputs), inputs, steps=1)
    (given,) = calls.inputs
    assert torch.equal(given["hint"], inputs["image"].movedim(-1, 1))
    assert torch.equal(given["soft_prompt"], inputs["soft_prompt"])


def test_positive_and_negative_run_as_one_batch(model: Any, inputs: dict[str, Any]) -> None:
    patched, positive, negative = applied(model, inputs)
    assert positive[0][1]["control"] is negative[0][1]["control"]
    with Calls() as calls:
        nets.run(patched, positive, negative, inputs, steps=3)
    assert [len(given["x"]) for given in calls.inputs] == [2, 2, 2]


def test_its_own_rca_acts(model: Any, inputs: dict[str, Any]) -> None:
    other = inputs | {"soft_prompt": nets.nano_inputs(size=8, seed=4)["soft_prompt"]}
    residuals = []
    for given, strength in ((inputs, 1.0), (other, 1.0), (inputs, 0.0), (other, 0.0)):
        with Calls() as calls:
            nets.run(*applied(model, given, rca_strength=strength), inputs, steps=1)
        residuals.append(calls.outputs[0]["middle"][0])
    assert not torch.allclose(residuals[0], residuals[1], rtol=1e-3)
    assert torch.equal(residuals[2], residuals[3])


def test_strength_scales_every_residual(model: Any, inputs: dict[str, Any]) -> None:
    control = nets.nano_seesr().control
    image = inputs["image"].movedim(-1, 1)
    found = []
    for strength in (1.0, 0.25):
        one = control.prepared(image, inputs["soft_prompt"], strength=strength, rca_strength=1.0, window=(0.0, 1.0))
        one.pre_run(model.model, model.get_model_object("model_sampling").percent_to_sigma)
        cond = {"c_crossattn": inputs["negative"][0][0]}
        found.append(one.get_control(inputs["latent"], torch.tensor([2.0]), cond, 1, {}))
        one.cleanup()
    for name, residuals in found[0].items():
        for whole, quarter in zip(residuals, found[1][name], strict=True):
            torch.testing.assert_close(quarter, 0.25 * whole)


@pytest.mark.parametrize(("window", "runs"), [((0.0, 1.0), 2), ((0.0, 0.4), 1), ((0.4, 0.8), 0)])
def test_window(model: Any, inputs: dict[str, Any], window: tuple[float, float], runs: int) -> None:
    start, end = window
    with Calls() as calls:
        nets.run(*applied(model, inputs, start_percent=start, end_percent=end), inputs)
    assert len(calls.inputs) == runs


def test_copies_share_weights_and_nothing_else(inputs: dict[str, Any]) -> None:
    control = nets.nano_seesr().control
    image = inputs["image"].movedim(-1, 1)
    first = control.prepared(image, inputs["soft_prompt"], strength=0.5, rca_strength=0.7, window=(0.1, 0.9))
    twin = first.copy()
    assert type(twin) is type(control)
    assert twin.control_model is control.control_model
    assert (twin.strength, twin.timestep_percent_range) == (0.5, (0.1, 0.9))
    assert twin.extra_args == first.extra_args
    twin.set_extra_arg("rca_strength", 0.0)
    assert first.extra_args["rca_strength"] == 0.7
    assert control.cond_hint_original is None
    assert "soft_prompt" not in control.extra_args
    assert [patcher.model for patcher in first.get_models()] == [control.control_model]


def test_chains_with_stock_controlnets_on_either_side(model: Any, inputs: dict[str, Any]) -> None:
    image, stock = inputs["image"].flip(1), stock_control(1)
    conditionings = (inputs["positive"][0], inputs["negative"])
    theirs = add_stock(stock, conditionings, image)
    before = applied(model, inputs, positive=theirs[0], negative=theirs[1])
    patched, positive, negative = applied(model, inputs)
    after = (patched, *add_stock(stock, (positive, negative), image))
    assert before[1][0][1]["control"].previous_controlnet is theirs[0][0][1]["control"]
    with Calls() as calls:
        first, second = nets.run(*before, inputs), nets.run(*after, inputs)
    assert [len(given["x"]) for given in calls.inputs] == [2] * 4
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)
    for other in (nets.run(model, *theirs, inputs), nets.run(patched, positive, negative, inputs)):
        assert not torch.allclose(first, other, atol=0.1)


def test_applied_again_replaces_and_keeps_the_others(model: Any, inputs: dict[str, Any]) -> None:
    image, stock = inputs["image"].flip(1), stock_control(1)
    theirs = add_stock(stock, (inputs["positive"][0], inputs["negative"]), image)
    older = applied(model, inputs, positive=theirs[0], negative=theirs[1], strength=0.2)
    chained = add_stock(stock, (older[1], older[2]), image)
    again = applied(older[0], inputs, positive=chained[0], negative=chained[1])
    links = list(plugin("nodes.host.control").chain(again[1][0][1]["control"]))
    ours = plugin("nodes.host.control").SeeSRControl
    assert [isinstance(link, ours) for link in links] == [True, False, False]
    assert links[0].strength == 1.0
    assert again[1][0][1]["control"] is again[2][0][1]["control"]
    # What the first nodes gave is as it was.
    assert isinstance(chained[0][0][1]["control"].previous_controlnet, ours)
    removed = applied(older[0], inputs, positive=older[1], negative=older[2], strength=0.0)
    assert removed[1][0][1]["control"] is theirs[0][0][1]["control"]


@pytest.mark.parametrize("size", [7, 12])
def test_photo_of_another_size_than_the_latent(model: Any, inputs: dict[str, Any], size: int) -> None:
    other = inputs | {name: nets.nano_inputs(size=size)[name] for name in ("latent", "noise")}
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match=f"64 × 64 pixels, .* {8 * size} × {8 * size};"):
        nets.run(*applied(model, inputs), other)
    assert nets.run(*applied(model, inputs), inputs).isfinite().all()


def test_more_photos_than_latents(model: Any) -> None:
    both = nets.nano_inputs(batch=2, size=8)
    one = both | {name: both[name][:1] for name in ("latent", "noise")}
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match="2 prepared images, but 1 latents"):
        nets.run(*applied(model, both), one)


@pytest.mark.parametrize("missing", ["model", "positive", "negative"])
def test_what_did_not_come_through_apply_is_told_before_sampling(
    missing: str, model: Any, inputs: dict[str, Any]
) -> None:
    names = ("model", "positive", "negative")
    plain = (model, inputs["positive"][0], inputs["negative"])
    given, positive, negative = (
        without if name == missing else with_it
        for name, with_it, without in zip(names, applied(model, inputs), plain, strict=True)
    )
    with Calls() as calls, pytest.raises(plugin("seesr_core.errors").SettingsError) as refusal:
        nets.run(given, positive, negative, inputs)
    assert ("MODEL being sampled" if missing == "model" else f"the {missing} conditioning") in str(refusal.value)
    assert f"Connect the {missing} output of the same SeeSR Apply" in str(refusal.value)
    assert not calls.outputs


def test_a_negative_that_is_left_out_may_be_any(model: Any, inputs: dict[str, Any]) -> None:
    patched, positive, negative = applied(model, inputs)
    expected = nets.run(patched, positive, negative, inputs, cfg=1.0)
    assert torch.equal(nets.run(patched, positive, inputs["negative"], inputs, cfg=1.0), expected)


def with_area(conditioning: Any, area: tuple[int, ...]) -> Any:
    """The host's own way to give a prompt an area (height, width, y, x in cells)."""
    return [[tokens, {**extras, "area": area, "strength": 1.0}] for tokens, extras in conditioning]


def test_prompts_with_areas_see_their_part_of_the_photo(model: Any) -> None:
    inputs = nets.nano_inputs(size=16)
    whole = inputs["positive"][0]
    halves = with_area(whole, (8, 16, 0, 0)) + with_area(whole, (8, 16, 8, 0))
    with Calls() as calls:
        nets.run(*applied(model, inputs, positive=whole + halves), inputs, steps=1)
    image = inputs["image"].movedim(-1, 1)
    shown = [given["hint"] for given in calls.inputs]
    for expected in (image, image[:, :, :64], image[:, :, 64:]):
        assert any(torch.equal(hint, expected) for hint in shown)


def test_areas_are_left_to_tiles_where_they_follow(model: Any) -> None:
    inputs = nets.nano_inputs(size=16)
    tiles = plugin("nodes.host.tiling.tiles")
    positive = with_area(inputs["positive"][0], (16, 8, 0, 0)) + inputs["positive"][0]
    patched, prompt, negative = applied(model, inputs, positive=positive)
    settings = tiles.TileSettings(tile=8, overlap=0)
    before, _, _ = applied(tiles.tile_model(model, settings), inputs, positive=positive)
    after = tiles.tile_model(patched, settings)
    results = [nets.run(one, prompt, negative, inputs, steps=1) for one in (after, before)]
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_two_photos_equal_two_runs(model: Any) -> None:
    both = nets.nano_inputs(batch=2, size=8, seed=3)
    batched = nets.run(*applied(model, both), both)
    for index in range(2):
        part = slice(index, index + 1)
        one = both | {name: both[name][part] for name in ("latent", "noise", "soft_prompt", "image", "positive")}
        alone = nets.run(*applied(model, one), one)
        torch.testing.assert_close(batched[part], alone, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(("reuse", "computed"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_one_output_serves_several_steps(model: Any, inputs: dict[str, Any], reuse: int, computed: list[int]) -> None:
    """The U-Net gets in every step what the ControlNet gave, strength and all, in the last one that computed."""
    patched, positive, negative = applied(model, inputs, strength=0.5, rca_strength=0.0, control_reuse=reuse)
    shown: list[Tensor] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(
        lambda _, args, kwargs: shown.append(kwargs["control"]["middle"][0].clone()), with_kwargs=True
    )
    try:
        with Calls() as calls:
            nets.run(patched, positive, negative, inputs, steps=5)
    finally:
        hook.remove()
    assert len(calls.outputs) == len(computed)
    for step, given in enumerate(shown):
        last = max(i for i, first in enumerate(computed) if first <= step)
        torch.testing.assert_close(given, 0.5 * calls.outputs[last]["middle"][0], rtol=0, atol=0)


def test_reuse_of_one_step_changes_nothing(model: Any, inputs: dict[str, Any]) -> None:
    plain, neutral, other = (
        nets.run(*applied(model, inputs, **given), inputs, steps=4)
        for given in ({}, {"control_reuse": 1}, {"control_reuse": 2})
    )
    assert torch.equal(plain, neutral)
    assert not torch.equal(plain, other)


@pytest.mark.parametrize("tiled", [False, True])
def test_the_image_encoder_is_asked_once_and_nothing_changes(
    model: Any, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for every tile and area, not in every step; bit for bit the same."""
    inputs, tiles = nets.nano_inputs(size=16), plugin("nodes.host.tiling.tiles")
    positive = with_area(inputs["positive"][0], (8, 8, 0, 8)) + inputs["positive"][0]
    patched, prompt, negative = applied(model, inputs, positive=positive)
    if tiled:
        patched = tiles.tile_model(patched, tiles.TileSettings(tile=8, overlap=0, tile_batch=1))
    asked: list[int] = []
    encoder = nets.nano_seesr().control.control_model.input_hint_block
    hook = encoder.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    try:
        kept, once = nets.run(patched, prompt, negative, inputs, steps=4), len(asked)
        monkeypatch.setattr(plugin("nodes.host.control"), "Embeddings", lambda: None)
        assert torch.equal(nets.run(patched, prompt, negative, inputs, steps=4), kept)
    finally:
        hook.remove()
    assert len(asked) - once == 4 * once
    assert all(entry[1]["control"].embeddings is None for entry in prompt)


def test_reused_outputs_are_those_of_the_tile_and_of_the_prompt(model: Any) -> None:
    """As many calls as in a run of half the steps, and the picture of one where each tile is sampled by itself."""
    inputs, tiles = nets.nano_inputs(size=16), plugin("nodes.host.tiling.tiles")
    positive = with_area(inputs["positive"][0], (16, 8, 0, 0)) + inputs["positive"][0]
    patched, prompt, negative = applied(model, inputs, positive=positive, control_reuse=2)
    found = []
    for at_once in (1, 2):
        tiled = tiles.tile_model(patched, tiles.TileSettings(tile=8, overlap=0, tile_batch=at_once))
        with Calls() as calls:
            found.append(nets.run(tiled, prompt, negative, inputs, steps=4))
        computed = [tuple(given["timesteps"].tolist()) for given in calls.inputs]
        assert len({levels[0] for levels in computed}) == 2
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_a_run_that_is_interrupted_leaves_nothing(model: Any, inputs: dict[str, Any]) -> None:
    patched, positive, negative = applied(model, inputs, control_reuse=2)
    control = positive[0][1]["control"]
    fresh = nets.run(patched, positive, negative, inputs, steps=3)

    def stop(*_: Any) -> None:
        assert control.kept is not None
        raise KeyboardInterrupt

    hook = model.model.diffusion_model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        nets.run(patched, positive, negative, inputs, steps=3)
    hook.remove()
    assert control.kept is None
    assert control.control_model is nets.nano_seesr().control.control_model
    assert torch.equal(nets.run(patched, positive, negative, inputs, steps=3), fresh)
