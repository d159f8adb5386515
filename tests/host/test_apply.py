"""SeeSR Apply as a node: lists of photos, one output, and every wrong plug in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import nets
from .locate import plugin


def arguments(model: Any, batch: int = 1, **changes: Any) -> dict[str, list[Any]]:
    """The node's inputs as the host hands them over: lists."""
    made = nets.nano_inputs(batch=batch, size=8)
    given = {
        "model": [model],
        "positive": made["positive"],
        "negative": [made["negative"]],
        "seesr_model": [nets.nano_seesr()],
        "soft_prompt": [made["soft_prompt"]],
        "image": [made["image"]],
        "strength": [1.0],
        "rca_strength": [1.0],
        "start_percent": [0.0],
        "end_percent": [1.0],
        "control_reuse": [1],
    }
    return given | changes


def execute(model: Any, batch: int = 1, **changes: Any) -> tuple[Any, Any, Any]:
    """The node's three outputs."""
    model_list, positive, negative = execute_list(model, batch, **changes)
    assert len(model_list) == len(positive) == len(negative) == 1
    return model_list[0], positive[0], negative[0]


def execute_list(model: Any, batch: int = 1, **changes: Any) -> Any:
    """What the node gives: lists."""
    return plugin("nodes.apply").SeeSRApply.execute(**arguments(model, batch, **changes)).args


def test_schema_is_what_saved_graphs_depend_on() -> None:
    schema = plugin("nodes.apply").SeeSRApply.GET_SCHEMA()
    assert schema.is_input_list
    assert [entry.id for entry in schema.inputs] == list(arguments(None))
    assert [output.display_name for output in schema.outputs] == ["model", "positive", "negative"]
    assert all(output.is_output_list for output in schema.outputs)
    assert all(entry.tooltip for entry in schema.inputs)
    defaults = {entry.id: entry.default for entry in schema.inputs if hasattr(entry, "default")}
    shares = {"strength": 1.0, "rca_strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    assert defaults == {**shares, "control_reuse": 1}


def test_strength_zero_attaches_nothing(model: Any) -> None:
    inputs = nets.nano_inputs(size=8)
    patched, positive, negative = execute(model, strength=[0.0], rca_strength=[0.0])
    assert not [wrapper for by_key in patched.wrappers.values() for wrappers in by_key.values() for wrapper in wrappers]
    assert not patched.get_nested_additional_models()
    assert "control" not in positive[0][1]
    plain = nets.run(model, inputs["positive"][0], inputs["negative"], inputs)
    assert torch.equal(nets.run(patched, positive, negative, inputs), plain)


def test_the_inputs_are_left_as_they_were(model: Any) -> None:
    inputs = nets.nano_inputs(size=8)
    positive, negative = inputs["positive"][0], inputs["negative"]
    before = nets.run(model, positive, negative, inputs)
    patched = execute(model, positive=[positive], negative=[negative])
    assert not torch.equal(nets.run(*patched, inputs), before)
    assert "control" not in positive[0][1]
    assert torch.equal(nets.run(model, positive, negative, inputs), before)


@pytest.mark.parametrize("soft", ["list", "batch"])
def test_a_list_of_photos_is_a_list_of_runs(soft: str, model: Any) -> None:
    """Batches of two photos, one photo of another size: each with its own prompts, as if alone."""
    two, one = nets.nano_inputs(batch=2, size=8), nets.nano_inputs(size=12, seed=4)
    soft_prompts = [two["soft_prompt"], one["soft_prompt"]]
    runs = execute_list(
        model,
        positive=[*two["positive"], *one["positive"]],
        soft_prompt=soft_prompts if soft == "list" else [torch.cat(soft_prompts)],
        image=[two["image"], one["image"]],
        strength=[1.0, 0.5],
    )
    for i, (inputs, strength) in enumerate(((two, 1.0), (one, 0.5))):
        own = {"positive": inputs["positive"], "soft_prompt": [inputs["soft_prompt"]], "image": [inputs["image"]]}
        alone = execute(model, 1, **own, strength=[strength])
        patched, positive, negative = (outputs[i] for outputs in runs)
        assert torch.equal(nets.run(patched, positive, negative, inputs), nets.run(*alone, inputs))


def test_a_list_without_its_prompts_is_refused(model: Any) -> None:
    images = [nets.nano_inputs(size=size)["image"] for size in (8, 8, 12)]
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match="2 entries of positive for a list of 3 prep"):
        execute_list(model, image=images, positive=nets.nano_inputs(batch=2)["positive"])


def test_two_photos_equal_two_runs(model: Any) -> None:
    both = nets.nano_inputs(batch=2, size=8)
    batched = nets.run(*execute(model, 2), both)
    for index in range(2):
        part = slice(index, index + 1)
        one = both | {name: both[name][part] for name in ("latent", "noise")}
        single = {name: [both[name][part]] for name in ("soft_prompt", "image")}
        single |= {"positive": both["positive"][part], "negative": [both["negative"]]}
        alone = nets.run(*execute(model, 1, **single), one)
        torch.testing.assert_close(batched[part], alone, atol=1e-3, rtol=1e-4)


def test_photos_are_kept_as_they_are(model: Any) -> None:
    """No copy of a large picture; what is out of range is cut for the network only."""
    inputs = nets.nano_inputs(size=8)
    usual = execute(model, image=[inputs["image"]])
    assert usual[1][0][1]["control"].cond_hint_original.data_ptr() == inputs["image"].data_ptr()
    beyond = inputs["image"].clone()
    beyond[inputs["image"] > 0.9], beyond[inputs["image"] < 0.1] = 7.0, -7.0
    cut = execute(model, image=[beyond.clamp(0.0, 1.0)])
    assert torch.equal(nets.run(*execute(model, image=[beyond]), inputs), nets.run(*cut, inputs))
    assert not torch.equal(nets.run(*cut, inputs), nets.run(*usual, inputs))


@pytest.mark.parametrize("tile", [512, 64])
def test_photos_in_8_bits_give_the_same_numbers(model: Any, tile: int) -> None:
    tiled = plugin("nodes.tiled")
    settings = tiled.TileSettings.from_pixels(tile, 16)
    inputs = nets.nano_inputs(size=12)
    levels = (255 * inputs["image"]).to(torch.uint8)
    found = []
    for image in (levels, levels.float() / 255.0):
        patched, positive, negative = execute(model, image=[image])
        found.append(nets.run(tiled.tile_model(patched, settings), positive, negative, inputs))
    assert torch.equal(*found)


def test_one_photo_serves_a_batch_of_latents(model: Any) -> None:
    one, many = nets.nano_inputs(size=8), nets.nano_inputs(size=8)
    for name in ("latent", "noise"):
        many[name] = torch.cat([one[name]] * 3)
    patched = execute(model)
    alone, batched = nets.run(*patched, one), nets.run(*patched, many)
    torch.testing.assert_close(batched, alone.expand(3, -1, -1, -1), atol=1e-3, rtol=1e-4)


def test_prompts_of_different_lengths_join_without_changing() -> None:
    join = plugin("nodes.host.conds").join_tokens
    short, long = torch.randn(1, 77, 8), torch.randn(1, 154, 8)
    joined = join([short, long])
    assert joined.shape == (2, 154, 8)
    query, key = torch.randn(1, 5, 8), joined[:1]
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(query, key, key), attend(query, short, short))
    assert torch.equal(joined[1:], long)


def test_pooled_outputs_join_and_other_entries_stay() -> None:
    join = plugin("nodes.host.conds").join_conditioning
    tokens, mask = torch.randn(1, 77, 8), torch.ones(1, 4, 4)
    given = [[[tokens, {"pooled_output": torch.full((1, 3), float(n)), "mask": mask, "strength": 0.5}]] for n in (1, 2)]
    ((_, extras),) = join(given, photos=2, width=8, name="positive")
    assert extras["pooled_output"].tolist() == [[1.0] * 3, [2.0] * 3]
    assert extras["strength"] == 0.5
    assert extras["mask"] is mask


def other_text(width: int) -> list[Any]:
    return [[torch.randn(1, 77, width), {}]]


def parts_differ(batch: int) -> list[Any]:
    entry = nets.nano_inputs()["negative"]
    return [entry, *[entry * 2] * (batch - 1)]


def strengths_differ(batch: int) -> list[Any]:
    ((tokens, _),) = nets.nano_inputs()["negative"]
    return [[[tokens, {"strength": 1.0 / (n + 1)}]] for n in range(batch)]


def nan_in(name: str, batch: int = 1) -> list[Any]:
    tensor = nets.nano_inputs(batch=batch, size=8)[name].clone()
    tensor.view(-1)[7] = float("nan")
    return [tensor]


WRONG_INPUTS = {
    "another DAPE": (1, lambda: {"soft_prompt": [torch.randn(1, 145, 512)]}, "is 512 wide, but nano attends to 256"),
    "soft prompts of other photos": (2, lambda: {"soft_prompt": [torch.randn(3, 17, 256)]}, "3 photos, but 2 prepared"),
    "one soft prompt for two": (2, lambda: {"soft_prompt": [torch.randn(1, 17, 256)]}, "1 photos, but 2 prepared"),
    "no soft prompt": (1, lambda: {"soft_prompt": [torch.randn(17, 256)]}, "connect SeeSR Soft Prompt"),
    "NaN soft prompt": (1, lambda: {"soft_prompt": nan_in("soft_prompt")}, "soft prompt holds values that are no num"),
    "sides": (
        1,
        lambda: {"image": [torch.rand(1, 60, 64, 3)]},
        "64 × 60 pixels; expected sides that are mul",
    ),
    "NaN image": (1, lambda: {"image": nan_in("image")}, "prepared image holds values that are no numbers"),
    "soft prompts of two taggers": (
        2,
        lambda: {"soft_prompt": [nets.nano_inputs()["soft_prompt"], nets.nano_inputs()["soft_prompt"][:, 1:]]},
        "soft prompts of one size for a batch",
    ),
    "prompts": (2, lambda: {"positive": [nets.nano_inputs()["negative"]] * 3}, "3 positive prompts for 2 prepared"),
    "negatives": (1, lambda: {"negative": [nets.nano_inputs()["negative"]] * 2}, "2 negative prompts for 1 prepared"),
    "another text encoder": (
        1,
        lambda: {"positive": [other_text(768)]},
        "from a text encoder of width 768",
    ),
    "other parts": (2, lambda: {"positive": parts_differ(2)}, "different numbers of parts"),
    "other strengths": (2, lambda: {"positive": strengths_differ(2)}, "differ in 'strength'"),
    "window": (1, lambda: {"start_percent": [0.8], "end_percent": [0.2]}, "start_percent is 0.8 and end_percent 0.2"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_input(model: Any, name: str) -> None:
    batch, changes, sentence = WRONG_INPUTS[name]
    with pytest.raises(plugin("seesr_core.errors").SeeSRError, match=sentence) as caught:
        execute(model, batch, **changes())
    assert str(caught.value).count("\n") == 0


def other_model(**entries: Any) -> Any:
    """A U-Net like the shipped one but for some entries of its configuration, of whatever family."""
    config = nets.nano_config()
    family = entries.pop("family", "SD20")
    return nets.host_model(config | {k: v for k, v in entries.items() if k in config}, None, family=family)


def predicting(kind: str) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = nets.nano_model()
    node = ModelSamplingDiscrete
    return node.execute(model, kind, False).args[0] if hasattr(node, "execute") else node().patch(model, kind, False)[0]


def no_unet() -> Any:
    model = nets.nano_model()
    model.model.diffusion_model = torch.nn.Linear(2, 2)
    return model


WRONG_MODELS = {
    "SD1.5": (
        lambda: other_model(cross_attention_dim=768, family="SD15"),
        "SD15 with 64 channels and text width 768",
    ),
    "SDXL": (
        lambda: other_model(cross_attention_dim=2048, family="SDXL"),
        "SDXL with 64 channels and text width 2048",
    ),
    "inpainting": (lambda: other_model(in_channels=9), "inpainting .* with 9 input channels;"),
    "wider": (lambda: other_model(block_out_channels=[128, 128, 128]), "SD20 with 128 channels"),
    "other levels": (
        lambda: other_model(block_out_channels=[64, 64, 128]),
        "text attention in 7 places of other",
    ),
    "v-prediction": (lambda: predicting("v_prediction"), "predicts v or something else"),
    "no U-Net": (no_unet, "is SD20, which is not a Stable Diffusion U-Net"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_wrong_model(name: str) -> None:
    make, sentence = WRONG_MODELS[name]
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match=sentence) as caught:
        execute(make())
    assert "nano was made for seesr-nano" in str(caught.value)


def test_other_noise_schedules_are_welcome() -> None:
    assert execute(predicting("lcm"))[0].get_nested_additional_models()
