"""SeeSRTilePrompts: every tile its own prompts, through SeeSR Apply and both tiled samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .locate import plugin
from .nets import LATENT_CHANNELS, nano_clip, nano_model, nano_seesr, nano_tagger
from .sampling import noise, outputs, sample_stock, sample_tiled, sigmas

TILES: dict[str, Any] = {"tile_size": 64, "overlap": 0}


def photos(count: int = 1, width: int = 32, seed: int = 0) -> Tensor:
    """Photos (B, 16, width, 3)."""
    return torch.rand(count, 16, width, 3, generator=torch.Generator().manual_seed(seed))


def enlarged(image: Tensor, scale: int = 4) -> Tensor:
    """Prepared pictures."""
    up = torch.nn.functional.interpolate(image.movedim(-1, 1), scale_factor=scale, mode="bicubic")
    return up.movedim(1, -1).clamp(0, 1)


def read(image: Tensor, prepared: Tensor | None = None, **changes: Any) -> tuple[Any, Any, list[str], Tensor]:
    """What SeeSRTilePrompts gives."""
    given = {**TILES, "use": "tags + soft prompt", "keep_global": True, "threshold": 0.7, "exclude": ""}
    given |= {"prompt": "", "added_prompt": "clean", **changes}
    found: tuple[Any, Any, list[str], Tensor] = outputs(
        plugin("nodes.local").SeeSRTilePrompts.execute(
            nano_tagger(), nano_clip(), image, enlarged(image) if prepared is None else prepared, **given
        )
    )
    return found


def encode(text: str) -> Any:
    return plugin("nodes.host.text").encode_text(nano_clip(), text)


def apply(model: Any, positive: Any, soft: Any, prepared: Tensor) -> tuple[Any, Any, Any]:
    """Model and conditionings after SeeSR Apply, the node itself."""
    given = {"strength": 1.0, "rca_strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    (patched,), (with_control,), (negative,) = outputs(
        plugin("nodes.apply").SeeSRApply.execute(
            model=[model],
            positive=[positive],
            negative=[encode("blur")],
            seesr_model=[nano_seesr()],
            soft_prompt=[soft],
            image=[prepared],
            **{name: [value] for name, value in given.items()},
        )
    )
    return patched, with_control, negative


def latent(prepared: Tensor, seed: int = 5) -> dict[str, Any]:
    batch, height, width, _ = prepared.shape
    generator = torch.Generator().manual_seed(seed)
    return {"samples": 5 * torch.randn(batch, LATENT_CHANNELS, height // 8, width // 8, generator=generator)}


def sampled(model: Any, positive: Any, soft: Any, prepared: Tensor, **options: Any) -> Tensor:
    """A step of the tiled sampler."""
    patched, *conditions = apply(model, positive, soft, prepared)
    given = {**TILES, "prompts": tuple(conditions), **options}
    return sample_tiled(patched, noise(), sigmas(patched, 1), latent(prepared), **given)


def ordinary(image: Tensor, threshold: float = 0.7) -> tuple[Any, Tensor, str]:
    """The plain prompts of one photo."""
    (line,) = plugin("nodes.prompts").extract_tags(nano_tagger(), image, threshold=threshold)
    text = plugin("nodes.prompts").compose_text(line, "", "clean")
    return encode(text), nano_tagger().read(image).tokens_BLD, line


def test_a_picture_of_one_tile_has_exactly_the_ordinary_prompts(model: Any) -> None:
    image = photos(width=16)
    positive, soft, lines, _ = read(image)
    expected, tokens, line = ordinary(image)
    assert lines == [line]
    assert torch.equal(positive[0][0], expected[0][0])
    assert torch.equal(soft, tokens)
    prepared = enlarged(image)
    assert torch.equal(sampled(model, positive, soft, prepared), sampled(model, expected, tokens, prepared))


@pytest.mark.parametrize("keep_global", [True, False])
@pytest.mark.parametrize("use", ["tags + soft prompt", "tags", "soft prompt"])
def test_each_tile_is_run_as_alone_with_its_own_prompts(model: Any, use: str, keep_global: bool) -> None:
    """Tiles that do not overlap, against the networks' run on each tile alone."""
    image = photos()
    prepared = enlarged(image)
    positive, soft, lines, _ = read(image, use=use, keep_global=keep_global)
    together = sampled(model, positive, soft, prepared)
    whole_positive, whole_tokens, whole_line = ordinary(image)
    drawn = noise().generate_noise(latent(prepared))
    for number, start in enumerate((0, 8)):
        part = image[:, :, 2 * start : 2 * start + 16]
        own_positive, own_tokens, own_line = ordinary(part)
        assert lines[number] == own_line
        if "tags" in use and keep_global:
            names = [*own_line.split(", "), *(n for n in whole_line.split(", ") if n not in own_line.split(", "))]
            own_positive = encode(plugin("nodes.prompts").compose_text(", ".join(names), "", "clean"))
        if keep_global:
            own_tokens = torch.cat([own_tokens, whole_tokens], 1)
        used_positive = own_positive if "tags" in use else whole_positive
        used_tokens = own_tokens if "soft" in use else whole_tokens
        cut = prepared[:, :, 8 * start : 8 * start + 64]
        patched, *conditions = apply(model, used_positive, used_tokens, cut)
        fixed = type("Fixed", (), {"seed": 3, "generate_noise": lambda _, __, s=start: drawn[..., s : s + 8]})()
        samples = {"samples": latent(prepared)["samples"][..., start : start + 8]}
        alone = sample_tiled(patched, fixed, sigmas(patched, 1), samples, prompts=tuple(conditions), **TILES)
        torch.testing.assert_close(together[..., start : start + 8], alone, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("before", [False, True], ids=["after Apply", "before Apply"])
def test_a_tile_model_gives_what_the_tiled_sampler_gives(model: Any, before: bool) -> None:
    def in_tiles(model: Any) -> Any:
        return outputs(plugin("nodes.tiled").SeeSRTileModel.execute(model, 64, 0))[0]

    image = photos()
    prepared = enlarged(image)
    positive, soft, *_ = read(image)
    patched, *conditions = apply(in_tiles(model) if before else model, positive, soft, prepared)
    tiled = patched if before else in_tiles(patched)
    stock = sample_stock(tiled, noise(), sigmas(patched, 1), latent(prepared), prompts=tuple(conditions))
    assert torch.equal(sampled(model, positive, soft, prepared), stock)


def test_sampled_whole_it_is_the_ordinary_run(model: Any) -> None:
    image = photos()
    prepared = enlarged(image)
    positive, soft, *_ = read(image)
    expected, tokens, _ = ordinary(image)
    whole = {"tile_size": 512}
    assert torch.equal(
        sampled(model, positive, soft, prepared, **whole), sampled(model, expected, tokens, prepared, **whole)
    )


def test_another_grid_takes_the_nearest_prompts(model: Any) -> None:
    image = photos()
    prepared = enlarged(image)
    positive, soft, *_ = read(image)
    found = sampled(model, positive, soft, prepared, tile_size=64, overlap=32)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, sampled(model, *ordinary(image)[:2], prepared, tile_size=64, overlap=32))


def test_a_batch_is_two_single_runs(model: Any) -> None:
    images = photos(count=2)
    prepared = enlarged(images)
    positive, soft, lines, shown = read(images)
    assert len(lines) == 4
    assert len(shown) == 2
    together = sampled(model, positive, soft, prepared)
    samples = latent(prepared)["samples"]
    for i in range(2):
        one = enlarged(images[i : i + 1])
        patched, *conditions = apply(model, *read(images[i : i + 1])[:2], one)
        own = type(noise())(seed=3 + i)
        alone = sample_tiled(
            patched, own, sigmas(patched, 1), {"samples": samples[i : i + 1]}, prompts=tuple(conditions), **TILES
        )
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=2e-3)


def test_lines_and_preview_go_row_by_row() -> None:
    image = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    _, soft, lines, shown = read(image, threshold=0.5)
    places = [(tile.y, tile.x) for tile in soft.tiles.tiles]
    assert places == sorted(places)
    assert len(places) == len(lines) == 6
    assert lines[1] == ordinary(image[:, :16, 16:32], 0.5)[2]
    assert shown.shape[1] / shown.shape[2] == pytest.approx(32 / 48, rel=0.01)


def test_the_tagger_looks_at_all_tiles_together_and_once() -> None:
    image, seen = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(9)), []
    hook = nano_tagger().patcher.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        read(image)
        read(image, use="tags")
    finally:
        hook.remove()
    assert seen == [1, 6], "the photo, then its six tiles"


def test_prompts_of_another_picture_are_named(model: Any) -> None:
    error = plugin("seesr_core.errors").SettingsError
    positive, soft, *_ = read(photos())
    other = enlarged(photos(width=48))
    plain, tokens, _ = ordinary(photos())
    with pytest.raises(error, match="are of a picture of 128 × 64"):
        apply(model, plain, soft, other)
    with pytest.raises(error, match="same prepared image"):
        apply(model, positive, tokens, other)
    with pytest.raises(error, match="2 photos and 1 prepared"):
        read(photos(count=2), enlarged(photos()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_precision_is_finite(dtype: torch.dtype) -> None:
    image = photos()
    positive, soft, *_ = read(image)
    assert torch.isfinite(sampled(nano_model(dtype=dtype), positive, soft, enlarged(image))).all()
