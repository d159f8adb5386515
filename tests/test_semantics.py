"""Semantics in their places, in the core: neutral values, one call a step, tiles with their own prompts, references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seesr_core.dape import tagger_input
from seesr_core.method.denoiser import Denoiser
from seesr_core.method.guidance import FaithfulDenoiser
from seesr_core.method.regions import Regions
from seesr_core.method.schedule import acp_at, sigma_from_acp
from seesr_core.method.text import compose_prompt, encode_prompts
from seesr_core.pictures.sizes import to_tensor
from seesr_core.pipeline import Prompts, SeeSRPipeline
from seesr_core.semantics import SemanticsReader
from seesr_core.tiling.grid import Tile, tile_grid
from seesr_core.tiling.prompts import TilePrompts, nearest, photo_part, with_global

from .small_nets import inputs, seeded_networks
from .tiny_model import photo, tiny_models

TILED: dict[str, Any] = {"tile": 64, "overlap": 0}


@pytest.fixture(scope="module")
def pipeline() -> SeeSRPipeline:
    return SeeSRPipeline(models=tiny_models())


def denoiser(**changes: Any) -> tuple[Denoiser, Tensor]:
    """A guided prediction of two pictures, and their latents."""
    unet, control = seeded_networks()
    given = inputs()
    made = Denoiser(
        unet=unet,
        controlnet=control,
        positive=given["text"],
        negative=given["text"].flip(0),
        soft_prompt=given["soft"],
        image=given["image"],
        cfg=3.0,
    )
    return replace(made, **changes), given["x"]


def regions(masks: Tensor | None = None, strength: float = 1.0) -> Regions:
    """The first tokens of a text belong to two masks."""
    given = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(5)) if masks is None else masks
    numbers = torch.zeros(2, 77, dtype=torch.int64)
    numbers[:, 1:3], numbers[:, 4:6] = 1, 2
    return Regions(masks=given, numbers=numbers, strength=strength)


@torch.no_grad()
def test_text_attention_is_a_softmax_with_the_mask_in_it() -> None:
    """Every text attention of both networks against one written out, in float64 and without diffusers' kernels."""
    placed = regions()
    made, x = denoiser(regions=placed)
    seen: list[tuple[Any, Tensor, Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        seen.append((module, args[0], kwargs["encoder_hidden_states"], output))

    networks: list[Any] = [made.unet, made.controlnet]
    for network in networks:
        for name, module in network.named_modules():
            if name.endswith("attn2") and "image_attentions" not in name:
                module.register_forward_hook(note, with_kwargs=True)
    made(x, 500)
    assert len(seen) == 6
    for attention, states, text, output in seen:
        side = round(states.shape[1] ** 0.5)
        pooled = torch.nn.functional.avg_pool2d(placed.masks.double(), 8 // side).flatten(2)
        factors = torch.ones(4, side * side, 77, dtype=torch.float64)
        for tag in (0, 1):
            factors[2:, :, placed.numbers[0] == tag + 1] = pooled[:, tag, :, None]
        q, k, v = (
            layer(source).double().unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for layer, source in ((attention.to_q, states), (attention.to_k, text), (attention.to_v, text))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * factors[:, None]
        mixed = ((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(output, attention.to_out[0](mixed.float()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_regions_cost_no_further_call_and_change_only_what_they_should() -> None:
    made, x = denoiser()
    calls: list[int] = []
    made.unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    plain = made(x, 500)
    assert not torch.equal(replace(made, regions=regions())(x, 500), plain)
    assert calls == [4, 4]


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_spatial_guidance_is_its_formula(share: float) -> None:
    made, x = denoiser()
    mask = torch.full((2, 1, 8, 8), share)
    mask[..., :3] = 1.0
    found = replace(made, share=mask)(x, 500)
    negative, positive = replace(made, positive=made.negative, cfg=1.0)(x, 500), replace(made, cfg=1.0)(x, 500)
    torch.testing.assert_close(found, negative + 3.0 * mask * (positive - negative), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[..., :3], made(x, 500)[..., :3])


def test_fidelity_is_its_formula_in_a_run() -> None:
    generator = torch.Generator().manual_seed(0)
    x, eps, z_lr = (torch.randn(1, 4, 5, 5, generator=generator) for _ in range(3))
    faithful = FaithfulDenoiser(denoise=lambda x, t: eps, z_lr=z_lr, timesteps=[801, 401, 1], fidelity=0.5)
    for t in (801, 401, 1):
        acp = acp_at(t)
        free, kept = ((x - (1 - acp) ** 0.5 * noise) / acp**0.5 for noise in (eps, faithful(x, t)))
        share = 0.5 * (sigma_from_acp(acp) / sigma_from_acp(acp_at(801))) ** 4.0
        torch.testing.assert_close(kept, free + share * (z_lr - free), rtol=1e-3, atol=1e-3)


NEUTRAL: list[dict[str, Any]] = [
    {"fidelity": 0.0},
    {"local_prompts": "off"},
    {"spatial_cfg": "off"},
    {"region_strength": 0.0},
]


@pytest.mark.parametrize("neutral", NEUTRAL)
def test_neutral_values_are_the_plain_run(pipeline: SeeSRPipeline, neutral: dict[str, Any]) -> None:
    plain = pipeline(photo(32, 16), pipeline.settings(**TILED))
    assert pixels(pipeline(photo(32, 16), pipeline.settings(**TILED, **neutral))) == pixels(plain)


@pytest.mark.parametrize("local", ["tags", "soft", "both"])
def test_a_picture_of_one_tile_has_the_ordinary_prompts(pipeline: SeeSRPipeline, local: Any) -> None:
    plain = pipeline(photo(), pipeline.settings(tile=64))
    assert pixels(pipeline(photo(), pipeline.settings(tile=64, local_prompts=local))) == pixels(plain)


@pytest.mark.parametrize(
    "placed",
    [{"fidelity": 0.9}, {"local_prompts": "both"}, {"spatial_cfg": "auto", "cfg": 3.0}, {"region_strength": 1.0}],
)
def test_each_of_them_changes_the_picture(pipeline: SeeSRPipeline, placed: dict[str, Any]) -> None:
    base = {**TILED, "cfg": placed.get("cfg", 1.5)}
    plain = pipeline(photo(32, 16), pipeline.settings(**base))
    assert pixels(pipeline(photo(32, 16), pipeline.settings(**{**base, **placed}))) != pixels(plain)


def pixels(result: Any) -> bytes:
    return np.asarray(result.image).tobytes()


@torch.no_grad()
def test_tiles_that_do_not_overlap_are_each_run_alone_with_its_own_prompts(pipeline: SeeSRPipeline) -> None:
    """Local prompts against sampling each tile by itself with the prompts of its own part of the photo."""
    picture, models = photo(32, 16), pipeline.models
    settings = pipeline.settings(**TILED, local_prompts="both")
    prompts = pipeline.read_prompts([picture], settings)
    assert prompts.soft_prompt is not None
    texts = pipeline.compose(prompts, settings)
    prepared = pipeline.prepare([picture], settings)
    states = pipeline.encode_text([settings.negative, *texts])
    z_lr = pipeline.encode(prepared, settings)
    semantics = pipeline.place([picture], prompts, texts, prepared, settings)
    assert semantics.text is not None
    assert semantics.soft is not None
    denoise = pipeline._denoiser(prepared, states, prompts.soft_prompt, settings, semantics)
    together = denoise(z_lr, 500)
    whole = [tag.name for tag in prompts.tags[0]]
    for left in (0, 8):
        part = to_tensor(picture.crop((2 * left, 0, 2 * left + 16, 16)))
        tokens, logits = models.dape(tagger_input(part, models.dape.config.image_size))
        own = [tag.name for tag in models.vocabulary.select(logits)[0]]
        text = compose_prompt([*own, *(name for name in whole if name not in own)], "", settings.added_prompt)
        alone = Denoiser(
            unet=models.unet,
            controlnet=models.controlnet,
            positive=encode_prompts([text], models.tokenizer, models.text_encoder),
            negative=states[:1],
            soft_prompt=torch.cat([tokens, prompts.soft_prompt], 1),
            image=prepared[..., 8 * left : 8 * left + 64].float() / 255.0,
            cfg=settings.cfg,
        )
        expected = alone(z_lr[..., left : left + 8], 500)
        torch.testing.assert_close(together[..., left : left + 8], expected, rtol=1e-4, atol=1e-4)


def test_tiles_of_a_batch_are_read_tile_by_tile(pipeline: SeeSRPipeline) -> None:
    pictures = [photo(32, 16, seed=seed) for seed in (0, 1)]
    settings = pipeline.settings(**TILED, local_prompts="soft")
    prompts = pipeline.read_prompts(pictures, settings)
    texts = pipeline.compose(prompts, settings)
    semantics = pipeline.place(pictures, prompts, texts, pipeline.prepare(pictures, settings), settings)
    assert semantics.soft is not None
    assert semantics.text is None
    tiles, length = semantics.soft.tiles, prompts.soft_prompt.shape[1]  # type: ignore[union-attr]
    at = semantics.soft.at(tiles)
    assert at.shape[:2] == (4, 2 * length)
    alone = pipeline.read_prompts([pictures[1].crop((16, 0, 32, 16))], settings).soft_prompt
    torch.testing.assert_close(at[3, :length], alone[0], rtol=1e-4, atol=1e-4)  # type: ignore[index]
    torch.testing.assert_close(at[3, length:], prompts.soft_prompt[1])  # type: ignore[index]


def test_another_grid_takes_the_prompt_of_the_nearest_centre() -> None:
    tiles = tile_grid(8, 24, 8, 0)
    prompts = TilePrompts(tiles=tuple(tiles), values=torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2))
    found = prompts.at([Tile(0, 2, 6, 6), Tile(0, 9, 6, 6), Tile(0, 16, 6, 6), Tile(0, 4, 8, 8)])
    assert found[:, 0, 0].tolist() == [0, 1, 2, 0]
    assert nearest(tiles, Tile(0, 0, 8, 24)) == 1


def test_a_part_of_the_photo_is_widened_to_whole_pixels() -> None:
    picture = torch.arange(5.0 * 7).reshape(1, 1, 5, 7)
    assert photo_part(picture, Tile(0, 0, 4, 4), 8, 12).shape[-2:] == (3, 3)
    assert photo_part(picture, Tile(4, 4, 4, 8), 8, 12).shape[-2:] == (3, 5)
    assert photo_part(torch.ones(1, 3, 1, 1), Tile(4, 4, 4, 4), 8, 8).shape[-2:] == (1, 1)


def test_a_tiles_own_tags_come_first_and_none_comes_twice() -> None:
    assert with_global(["b", "c"], ["a", "b"]) == ["b", "c", "a"]


def test_regions_of_a_prompt_longer_than_the_text_window_keep_what_is_left(pipeline: SeeSRPipeline) -> None:
    """The tiny encoder takes 16 tokens; tags beyond are cut off there, so that nothing is bound to them."""
    settings = pipeline.settings(region_strength=1.0)
    picture = photo()
    tags = pipeline.read_prompts([picture], settings).tags[0] * 4
    reader = SemanticsReader(
        models=pipeline.models,
        settings=settings,
        photos=[picture],
        tags=[tags],
        texts=pipeline.compose(Prompts(tags=[tags], soft_prompt=None), settings),
        soft_prompt=None,
        size=(8, 8),
    )
    found = reader.read().regions
    assert found is not None
    assert found.numbers.shape == (1, 16)
    assert found.numbers[0, 0] == found.numbers[0, -1] == 0
    assert found.numbers[0, 1] == 1
    assert found.masks.shape[1] == len(tags) > found.numbers.max()


def test_a_photo_without_tags_is_guided_everywhere(pipeline: SeeSRPipeline) -> None:
    settings = pipeline.settings(spatial_cfg="auto", region_strength=1.0, cfg=3.0)
    prompts = Prompts(tags=[[]], soft_prompt=None)
    texts = pipeline.compose(prompts, settings)
    placed = pipeline.place([photo()], prompts, texts, pipeline.prepare([photo()], settings), settings)
    assert placed.regions is None
    assert placed.share is not None
    assert bool((placed.share == 1).all())


def test_without_guidance_it_says_that_there_is_nothing_to_place(
    pipeline: SeeSRPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline(photo(), pipeline.settings(spatial_cfg="auto", cfg=1.0))
    assert "there is no guidance to place" in caplog.text
