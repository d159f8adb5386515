"""SegSR's nodes: bit-equality before training, one answer a noise level, tiles, batches, interrupts, wrong plugs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .locate import plugin
from .nets import LATENT_CHANNELS, nano_inputs, nano_seesr, nano_tagger, run
from .sampling import outputs
from .small_nodes import applied

SIDE = 8


def segsr_model(*, trained: bool = True, **sizes: Any) -> Any:
    """A SEGSR_MODEL of random weights that fits the shipped model; untrained ones have a silent bridge."""
    core = plugin("seesr_core.segsr.model")
    fitting = {"latent_channels": LATENT_CHANNELS, "token_width": 256, "hint_channels": 64, "widths": (16, 32)}
    classes = core.ClassList(names=["sky", "wall", "grass"], palette=[(90, 140, 220), (200, 80, 60), (60, 160, 80)])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        segsr = core.SegSR(core.SegSRConfig(**{**fitting, **sizes}), classes).eval().requires_grad_(False)
        if trained:
            for encoder in (segsr.bridge.image, segsr.bridge.segmentation):
                encoder.conv_out.weight.normal_(std=0.3)
    return plugin("nodes.host.segsr").wrap_segsr(segsr, name="test")


def given(batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """A photo's inputs, with as many tokens as the shipped tagger gives."""
    inputs = nano_inputs(batch, SIDE, seed)
    inputs["soft_prompt"] = torch.randn(batch, 65, 256, generator=torch.Generator().manual_seed(seed))
    return inputs


def seesr(model: Any, inputs: dict[str, Any]) -> Any:
    """What SeeSR Apply gives."""
    return applied(model, inputs["positive"], inputs["negative"], nano_seesr(), inputs["soft_prompt"], inputs["image"])


def joined(model: Any, inputs: dict[str, Any], segsr: Any, strength: float = 1.0, segmentation: Any = None) -> Any:
    """What SegSR Apply makes of it."""
    plugs = seesr(model, inputs)
    node = plugin("nodes.segsr").SegSRApply
    more = (inputs["image"], nano_tagger(), inputs["soft_prompt"], strength, segmentation)
    return outputs(node.execute(*plugs, segsr, *more))


def go(plugs: Any, inputs: dict[str, Any], steps: int = 3) -> Tensor:
    """A short run."""
    model, positive, negative = plugs
    return run(model, positive, negative, inputs, steps=steps)


def sampled(model: Any, inputs: dict[str, Any], segsr: Any, steps: int = 3, **options: Any) -> Tensor:
    """Latents of a run with it."""
    return go(joined(model, inputs, segsr, **options), inputs, steps)


def segmentation_of(latent: Tensor) -> Any:
    """What SegSR Segmentation shows."""
    return outputs(plugin("nodes.segsr").SegSRSegmentation.execute({"samples": latent}))


def test_before_training_the_picture_is_bit_for_bit_that_of_seesr(model: Any) -> None:
    inputs = given()
    plain = go(seesr(model, inputs), inputs, 3)
    assert torch.equal(sampled(model, inputs, segsr_model(trained=False)), plain)


def test_at_strength_0_it_is_too_and_the_segmentation_is_there(model: Any) -> None:
    inputs = given()
    plain = go(seesr(model, inputs), inputs, 3)
    found = sampled(model, inputs, segsr_model(), strength=0.0)
    assert torch.equal(found, plain)
    labels, masks, names = segmentation_of(found)
    assert labels.shape == (1, 8 * SIDE, 8 * SIDE, 3)
    assert torch.equal(masks.sum(0), torch.ones(8 * SIDE, 8 * SIDE))
    assert len(names) == 1
    assert set(names[0].split(", ")) <= {"sky", "wall", "grass"}


def test_a_trained_bridge_changes_the_picture_and_a_second_run_is_the_same(model: Any) -> None:
    inputs, segsr = given(), segsr_model()
    plain = go(seesr(model, inputs), inputs, 3)
    first, second = (sampled(model, inputs, segsr) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert torch.equal(go(seesr(model, inputs), inputs, 3), plain)


def test_a_batch_equals_single_runs(model: Any) -> None:
    both, segsr = given(2), segsr_model()
    together = sampled(model, both, segsr)
    for i in range(2):
        one = {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in both.items()} | {
            "positive": [both["positive"][i]]
        }
        plugs = joined(model, one, segsr)
        import comfy.sample
        import comfy.samplers

        levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
        alone = comfy.sample.sample_custom(
            plugs[0],
            one["noise"],
            3.0,
            comfy.samplers.ksampler("euler"),
            levels,
            plugs[1],
            plugs[2],
            one["latent"],
            disable_pbar=True,
            seed=i,
        )
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["heun", "dpm_2", "euler_ancestral", "dpmpp_2m"])
def test_every_level_is_asked_once_whatever_the_solver_does(
    model: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.sample
    import comfy.samplers

    inputs, asked, told = given(), [], []
    joint = plugin("seesr_core.segsr.joint").JointRun
    at, following = joint.at, joint._next

    def counted(self: Any, acp: float) -> Any:
        told.append(acp)
        return at(self, acp)

    def made(self: Any, acp: float) -> Any:
        asked.append(acp)
        return following(self, acp)

    monkeypatch.setattr(joint, "at", counted)
    monkeypatch.setattr(joint, "_next", made)
    levels = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    plugs = joined(model, inputs, segsr_model())
    sampler = comfy.samplers.ksampler(name)
    comfy.sample.sample_custom(
        plugs[0], inputs["noise"], 3.0, sampler, levels, *plugs[1:], inputs["latent"], disable_pbar=True, seed=0
    )
    assert len(asked) == len(set(asked)) == len(set(told))
    assert len(told) > len(asked) or name in ("dpm_2", "euler_ancestral", "dpmpp_2m")


def test_tiles_tile_the_segmentation_too(model: Any) -> None:
    settings = plugin("nodes.host.tiling.tiles").TileSettings
    tile_model = plugin("nodes.host.tiling.tiles").tile_model
    inputs = nano_inputs(1, 16)
    inputs["soft_prompt"] = given()["soft_prompt"]
    plugs = joined(model, inputs, segsr_model())
    seen: list[tuple[int, ...]] = []
    segdm = plugs[0].get_additional_models_with_key("segsr")[0].model.segdm
    hook = segdm.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    try:
        latent = go((tile_model(plugs[0], settings(tile=8, overlap=2)), *plugs[1:]), inputs)
    finally:
        hook.remove()
    assert set(seen) == {(8, 8)}
    assert segmentation_of(latent)[0].shape[1:3] == (128, 128)


def test_an_interrupt_leaves_nothing_behind(model: Any) -> None:
    import comfy.model_management as management

    inputs = given()
    plugs = joined(model, inputs, segsr_model())
    first = go(plugs, inputs)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        go(plugs, inputs)
    management.interrupt_current_processing(False)
    assert "segsr" not in plugs[0].model_options.get("transformer_options", {})
    assert torch.equal(go(plugs, inputs), first)


def test_a_segmentation_to_start_from_is_heeded_as_picture_and_as_masks(model: Any) -> None:
    inputs, segsr = given(), segsr_model()
    colour = torch.tensor(segsr.classes.palette[1]).float() / 255
    picture = colour.expand(1, 64, 64, 3)
    masks = torch.zeros(3, 32, 32)
    masks[1] = 1.0
    free = sampled(model, inputs, segsr)
    started = [sampled(model, inputs, segsr, segmentation=given) for given in (picture, masks)]
    assert torch.equal(*started)
    assert not torch.equal(started[0], free)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (torch.zeros(4, 64, 64), "got 4 masks for a list of 3 classes"),
        (torch.zeros(3, 64, 64), "void"),
        (torch.zeros(1, 64, 64, 3), "void"),
        (torch.full((1, 64, 64, 3), 0.77), r"holds the colour \(196, 196, 196\)"),
        (torch.ones(3, 64, 32), "32 × 64 pixels, the prepared image 64 × 64"),
    ],
)
def test_a_segmentation_that_cannot_be_is_refused(model: Any, segmentation: Tensor, reason: str) -> None:
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match=reason):
        joined(model, given(), segsr_model(), segmentation=segmentation)


def test_wrong_plugs_are_refused(model: Any) -> None:
    inputs, segsr = given(), segsr_model()
    node, error = plugin("nodes.segsr").SegSRApply, plugin("seesr_core.errors").SettingsError
    more = (inputs["image"], nano_tagger())
    with pytest.raises(error, match="connect the outputs of SeeSR Apply"):
        node.execute(model, inputs["positive"][0], inputs["negative"], segsr, *more, inputs["soft_prompt"], 1.0)
    with pytest.raises(error, match=r"expected a soft prompt of shape \(1, 65, 256\)"):
        joined(model, nano_inputs(1, SIDE), segsr)
    with pytest.raises(error, match="first width 32, this one has 64"):
        joined(model, inputs, segsr_model(hint_channels=32))
    with pytest.raises(error, match="found an empty one"):
        sampled(model, {**inputs, "latent": torch.zeros_like(inputs["latent"])}, segsr)
    with pytest.raises(error, match="brings no segmentation"):
        segmentation_of(torch.zeros(1, LATENT_CHANNELS, 4, 4))


def test_what_the_controlnet_learnt_is_in_its_weights_while_it_is_used_and_not_after(model: Any) -> None:
    inputs, segsr = given(), segsr_model(trained=False)
    width = 16
    segsr.networks.control = {"controlnet_cond_embedding.conv_in.bias.diff": torch.full((width,), 0.7)}
    plain = go(seesr(model, inputs), inputs, 2)
    changed = sampled(model, inputs, segsr, steps=2)
    assert not torch.equal(changed, plain)
    assert torch.equal(sampled(model, inputs, segsr, steps=2, strength=0.0), plain)
    assert torch.equal(go(seesr(model, inputs), inputs, 2), plain)
