"""Grounded tags and prompts bound to regions in the host: references, neutral values, batches, tiles, wrong plugs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import nets
from .locate import plugin
from .nets import NANO, nano_clip, nano_model, nano_seesr, nano_tagger
from .sampling import noise, outputs, sample_tiled, sigmas

SIDE = 8


def region_prompt(tags: str | Sequence[str], masks: Tensor | list[Tensor], strength: float = 1.0, **words: str) -> Any:
    """What SeeSRRegionPrompt gives: a list of conditionings."""
    given: dict[str, Any] = {"prompt": "", "added_prompt": "clean", **words}
    node = plugin("nodes.regions").SeeSRRegionPrompt
    return outputs(
        node.execute(
            clip=[nano_clip()],
            tags=[tags] if isinstance(tags, str) else list(tags),
            masks=masks if isinstance(masks, list) else [masks],
            strength=[strength],
            **{name: [text] for name, text in given.items()},
        )
    )[0]


def plain_prompt(text: str) -> Any:
    return plugin("nodes.host.text").encode_text(nano_clip(), text)


def apply(model: Any, positive: list[Any], inputs: dict[str, Any], **changes: Any) -> tuple[Any, Any, Any]:
    """Model and conditionings after SeeSR Apply."""
    given = {"positive": positive, "negative": [plain_prompt("blur")], **changes}
    return plugin("nodes.apply").apply_seesr(
        model,
        given.pop("positive"),
        given.pop("negative"),
        nano_seesr(),
        inputs["soft_prompt"],
        inputs["image"],
        **given,
    )


def run(model: Any, positive: list[Any], inputs: dict[str, Any], **changes: Any) -> Tensor:
    """A short run after SeeSR Apply."""
    return nets.run(*apply(model, positive, inputs, **changes), inputs)


def half(count: int = 1) -> Tensor:
    """A mask of the left half, and its opposite."""
    mask = torch.zeros(2, 64, 64)
    mask[0, :, :32], mask[1, :, 32:] = 1.0, 1.0
    return mask[:count]


def test_strength_0_masks_of_ones_and_no_tags_are_the_plain_run_bit_for_bit(model: Any) -> None:
    inputs = nets.nano_inputs(size=SIDE)
    text = "food, vegetable, ,clean"
    plain = run(model, [plain_prompt(text)], inputs)
    for positive in (
        region_prompt("food, vegetable", half(2), 0.0),
        region_prompt("food, vegetable", torch.ones(2, 30, 20)),
    ):
        assert torch.equal(run(model, positive, inputs), plain)
    assert not torch.equal(run(model, region_prompt("food, vegetable", half(2)), inputs), plain)
    assert torch.equal(run(model, [plain_prompt(text)], inputs), plain), "the model itself was changed"


class Attention:
    """Notes what goes into and comes out of every text attention of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = {
            name: module
            for name, module in network.named_modules()
            if name.endswith("attn2") and not name.startswith("rca.")
        }
        self.seen: dict[str, dict[str, Tensor]] = {name: {} for name in self.modules}
        self.handles = [self._note(*item) for item in self.modules.items()]

    def _note(self, name: str, module: Any) -> list[Any]:
        handles = [
            getattr(module, part).register_forward_hook(functools.partial(self._output, name, part))
            for part in ("to_q", "to_k", "to_v")
        ]
        return [*handles, module.to_out.register_forward_pre_hook(functools.partial(self._input, name))]

    def _output(self, name: str, part: str, _module: Any, inputs: Any, output: Tensor) -> None:
        self.seen[name] |= {part: output, f"{part} of": inputs[0]}

    def _input(self, name: str, _module: Any, inputs: Any) -> None:
        self.seen[name]["mixed"] = inputs[0]

    def remove(self) -> None:
        for handles in self.handles:
            for handle in handles:
                handle.remove()


def test_text_attention_is_a_softmax_with_the_masks_in_it(model: Any) -> None:
    """Every text attention of the U-Net and of the ControlNet against one written out; both halves in one call."""
    inputs = nets.nano_inputs(size=SIDE)
    masks = torch.rand(2, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    positive = region_prompt("food, vegetable", masks, 0.7)
    (((tokens, extras),),) = positive
    (region,) = extras["seesr_regions"]
    watched = [Attention(network) for network in (model.model.diffusion_model, nano_seesr().control.control_model)]
    try:
        nets.run(*apply(model, positive, inputs), inputs, steps=1)
    finally:
        for attention in watched:
            attention.remove()
    assert min(len(attention.seen) for attention in watched) > 2
    for attention in watched:
        for name, seen in attention.seen.items():
            heads = attention.modules[name].heads
            q, k, v = (
                seen[part].double().unflatten(-1, (heads, -1)).transpose(1, 2) for part in ("to_q", "to_k", "to_v")
            )
            side = round(q.shape[2] ** 0.5)
            pooled = torch.nn.functional.avg_pool2d(masks.double()[None], SIDE // side).flatten(2)[0] ** 0.7
            factors = torch.ones(2, 1, side * side, k.shape[2], dtype=torch.float64)
            row = next(i for i, text in enumerate(seen["to_k of"]) if torch.allclose(text, tokens[0], atol=1e-5))
            for number in (1, 2):
                factors[row, 0][:, region.numbers == number] = pooled[number - 1][:, None]
            weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * factors
            mixed = ((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)
            torch.testing.assert_close(seen["mixed"].double(), mixed, rtol=1e-3, atol=1e-4)


def test_one_call_of_the_networks_a_step_however_many_regions(model: Any) -> None:
    inputs = nets.nano_inputs(size=SIDE)
    calls: list[int] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    try:
        run(model, region_prompt("food, vegetable, meat", torch.rand(3, 20, 20)), inputs)
    finally:
        hook.remove()
    assert calls == [2, 2]


def test_tokens_of_tags_are_found(model: Any) -> None:
    counter = plugin("nodes.host.text").token_counter(nano_clip())
    (((_, extras),),) = region_prompt("food, motor vehicle (red, old), cat", torch.zeros(3, 8, 8), prompt="nice")
    (region,) = extras["seesr_regions"]
    counts = [counter(tag) for tag in ("food", "motor vehicle (red, old)", "cat")]
    assert [int((region.numbers == number).sum()) for number in (1, 2, 3)] == counts
    commas = counter(",")
    assert region.numbers[: 2 + counts[0] + commas].tolist() == [0, *[1] * counts[0], *[0] * commas, 2]


def test_a_batch_of_photos_with_different_tags_is_two_single_runs(model: Any) -> None:
    inputs = nets.nano_inputs(batch=2, size=SIDE)
    lines = ["food, vegetable", "cat"]
    masks = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    together = run(model, region_prompt(lines, masks), inputs)
    for i, own in enumerate(masks.split([2, 1])):
        single = {name: value[i : i + 1] for name, value in inputs.items() if isinstance(value, Tensor)}
        alone = run(model, region_prompt(lines[i], own), single)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_a_photo_without_regions_in_the_batch_sees_its_whole_prompt(model: Any) -> None:
    inputs = nets.nano_inputs(batch=2, size=SIDE)
    bound = region_prompt("food, vegetable", half(2))
    free = plain_prompt("cat, ,clean")
    together = run(model, [*bound, free], inputs)
    single = {name: value[1:] for name, value in inputs.items() if isinstance(value, Tensor)}
    torch.testing.assert_close(together[1:], run(model, [free], single), rtol=1e-3, atol=1e-3)


def test_tiles_that_do_not_overlap_are_run_alone_with_their_part_of_the_masks(model: Any) -> None:
    inputs = nets.nano_inputs(size=SIDE)
    wide = {name: torch.cat([inputs[name]] * 2, dim) for name, dim in (("image", 2), ("latent", 3), ("noise", 3))}
    wide["soft_prompt"] = inputs["soft_prompt"]
    mask = torch.rand(1, SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(2))
    patched, positive, negative = apply(model, region_prompt("food", mask), wide)
    levels, latent = sigmas(patched, 1), {"samples": wide["latent"]}
    options = {"tile_size": 64, "overlap": 0}
    together = sample_tiled(patched, noise(), levels, latent, prompts=(positive, negative), **options)
    drawn = noise().generate_noise(latent)
    for start in (0, SIDE):
        part = {**inputs, "latent": wide["latent"][..., start : start + SIDE]}
        part["noise"] = drawn[..., start : start + SIDE]
        conditions = apply(model, region_prompt("food", mask[..., start : start + SIDE]), part)
        fixed = type("Fixed", (), {"seed": 3, "generate_noise": lambda _, __, given=part["noise"]: given})()
        alone = sample_tiled(
            conditions[0], fixed, levels, {"samples": part["latent"]}, prompts=conditions[1:], **options
        )
        torch.testing.assert_close(together[..., start : start + SIDE], alone, rtol=1e-3, atol=1e-3)


def test_another_nodes_attention_is_kept_and_named(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    inputs, asked = nets.nano_inputs(size=SIDE), []

    def other(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        asked.append(options["block"])
        return torch.zeros_like(q)

    taken = model.clone()
    block = next(iter(plugin("nodes.host.rca").text_transformers(model.model.diffusion_model)))[0]
    taken.set_model_attn2_replace(other, *block)
    with caplog.at_level(logging.WARNING):
        run(taken, region_prompt("food", half()), inputs)
    assert asked
    assert "another node has replaced its text attention" in caplog.text


def test_nothing_is_said_when_all_is_well(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(model, region_prompt("food", half()), nets.nano_inputs(size=SIDE))
    assert "Region Prompt" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_is_finite(dtype: torch.dtype) -> None:
    found = run(nano_model(dtype=dtype), region_prompt("food, cat", torch.zeros(2, 8, 8)), nets.nano_inputs(size=SIDE))
    assert torch.isfinite(found).all()


def test_regions_chain_with_the_hosts_own_patches(model: Any) -> None:
    from comfy_extras.nodes_freelunch import FreeU_V2
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    pag = PerturbedAttentionGuidance()
    inputs = nets.nano_inputs(size=SIDE)
    freed = (getattr(FreeU_V2, "execute", None) or FreeU_V2().patch)(model, 1.3, 1.4, 0.9, 0.2)
    patched = outputs((getattr(pag, "execute", None) or pag.patch)(outputs(freed)[0], 3.0))[0]
    bound = run(patched, region_prompt("food", half()), inputs)
    assert torch.isfinite(bound).all()
    assert not torch.equal(bound, run(patched, [plain_prompt("food, ,clean")], inputs))
    assert not torch.equal(bound, run(model, region_prompt("food", half()), inputs))


def test_a_second_apply_without_regions_takes_them_out(model: Any) -> None:
    inputs = nets.nano_inputs(size=SIDE)
    patched, *_ = apply(model, region_prompt("food", half()), inputs)
    free = [plain_prompt("food, ,clean")]
    assert torch.equal(run(patched, free, inputs), run(model, free, inputs))


def test_a_prompt_of_several_windows_is_bound_in_all_of_them(model: Any) -> None:
    tags = ", ".join(f"tag {number}" for number in range(40))
    (((tokens, extras),),) = region_prompt(tags, torch.zeros(40, 8, 8))
    (region,) = extras["seesr_regions"]
    assert tokens.shape[1] == len(region.numbers) > 77
    assert set(region.numbers.tolist()) == set(range(41))
    assert torch.isfinite(run(model, region_prompt(tags, torch.zeros(40, 8, 8)), nets.nano_inputs(size=SIDE))).all()


def test_wrong_masks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    error = plugin("seesr_core.errors").SettingsError
    for masks, message in (
        (torch.zeros(3, 8, 8), "3 masks for 2 tags"),
        (torch.full((2, 8, 8), torch.nan), "no numbers"),
        (torch.ones(1, 8, 8, 3), "number, height, width"),
        (torch.full((2, 8, 8), -1.0), "from 0 to 1"),
    ):
        with pytest.raises(error, match=message):
            region_prompt("food, cat", masks)
    with pytest.raises(error, match="connect one batch"):
        region_prompt("food, cat", [torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)])
    with caplog.at_level(logging.WARNING):
        region_prompt("food, cat", torch.zeros(1, 8, 8))
    assert "the last 1 act everywhere" in caplog.text


def ground(image: Tensor, **changes: Any) -> tuple[list[str], Tensor, Tensor]:
    given = {"threshold": 1.0, "exclude": "", "language": "en", **changes}
    found: tuple[list[str], Tensor, Tensor] = outputs(
        plugin("nodes.regions").SeeSRGroundTags.execute(nano_tagger(), image, **given)
    )
    return found


def example(size: tuple[int, int] = (96, 64)) -> Tensor:
    """The shipped photo, (1, H, W, 3)."""
    from PIL import Image

    photo = Image.open(NANO / "example.jpg").convert("RGB").resize(size)
    return plugin("nodes.regions").as_image(photo)[None]


def test_ground_tags_gives_a_mask_for_each_tag_and_a_picture() -> None:
    lines, masks, shown = ground(example(), threshold=0.7)
    read = plugin("nodes.prompts").SeeSRExtractTags.execute(nano_tagger(), example(), 0.7, "", "en")
    assert lines == outputs(read)[0]
    assert masks.shape == (len(lines[0].split(", ")), 64, 96)
    assert masks.min() >= 0
    assert masks.amax((1, 2)).min() > 0.9
    assert shown.shape[0] == 1
    assert shown.shape[1] / shown.shape[2] == pytest.approx(64 / 96, rel=0.01)


def test_grounding_is_the_cores() -> None:
    core = plugin("seesr_core.dape.grounding")
    image = example()
    _, masks, _ = ground(image)
    network = nano_tagger().patcher.model
    tags = nano_tagger().vocabulary.select(nano_tagger().read(image).logits_BN)[0]
    assert tags
    torch.testing.assert_close(masks, core.ground(network, image[0].movedim(-1, 0), tags), rtol=1e-4, atol=1e-4)


def test_ground_tags_of_a_batch_feed_the_region_prompt() -> None:
    batch = torch.cat([example(), example().flip(2)])
    lines, masks, shown = ground(batch, threshold=0.7)
    counts = [len(line.split(", ")) for line in lines]
    assert len(masks) == sum(counts)
    assert len(shown) == 2
    by_photo = plugin("nodes.host.photo_masks").by_photo
    assert [len(own) for own in by_photo(masks, masks)] == counts
    first, second = region_prompt(lines, masks)
    assert torch.equal(first[0][1]["seesr_regions"][0].masks, masks[: counts[0]])
    assert torch.equal(second[0][1]["seesr_regions"][0].masks, masks[counts[0] :])


def test_a_photo_without_tags_gives_a_mask_of_ones_that_binds_nothing() -> None:
    lines, masks, shown = ground(example(), threshold=10.0)
    assert lines == [""]
    assert torch.equal(masks, torch.ones(1, 64, 96))
    (((_, extras),),) = region_prompt(lines, masks)
    assert "seesr_regions" not in extras
    assert torch.isfinite(shown).all()


def test_chinese_tags_are_drawn_in_english() -> None:
    english, _, shown = ground(example(), threshold=0.7)
    chinese, _, same = ground(example(), threshold=0.7, language="zh")
    assert english != chinese
    assert torch.equal(shown, same)
