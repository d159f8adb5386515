"""SeeSRFidelity and SeeSRSpatialGuidance: formulas on the sampler's own predictions, neutral values, wrong plugs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from .locate import plugin
from .nets import nano_model
from .sampling import (
    ddpm,
    host_extras,
    latents,
    noise,
    outputs,
    prompts,
    sample_stock,
    sample_tiled,
    sigmas,
    unet_inputs,
)

SCALE = 0.18215


def faithful(model: Any, latent: Any, fidelity: float, decay: float = 4.0) -> Any:
    """What SeeSRFidelity makes of a model."""
    return outputs(plugin("nodes.steering").SeeSRFidelity.execute(model, latent, fidelity, decay))[0]


def guided(model: Any, mask: Tensor, outside: float = 0.0, feather: int = 0) -> Any:
    """What SeeSRSpatialGuidance makes of a model."""
    return outputs(plugin("nodes.steering").SeeSRSpatialGuidance.execute(model, mask, outside, feather))[0]


def half(height: int = 64, width: int = 64, count: int = 1) -> Tensor:
    """A mask of the left half."""
    mask = torch.zeros(count, height, width)
    mask[..., : width // 2] = 1.0
    return mask


class Spy:
    """Notes what passes it after guidance."""

    def __deepcopy__(self, _: Any) -> Spy:
        """Older hosts copy what a model carries."""
        return self

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, args: dict[str, Any]) -> Tensor:
        self.seen.append({name: args[name] for name in ("denoised", "cond_denoised", "uncond_denoised", "sigma")})
        denoised: Tensor = args["denoised"]
        return denoised


def spied(model: Any) -> tuple[Any, Spy]:
    patched, spy = model.clone(), Spy()
    patched.set_model_sampler_post_cfg_function(spy)
    return patched, spy


def run(model: Any, latent: Any, steps: int = 3, **options: Any) -> Tensor:
    """A few steps of the host's own node."""
    return sample_stock(model, noise(), sigmas(model, steps), latent, **options)


@pytest.mark.parametrize(("fidelity", "decay"), [(0.5, 4.0), (1.0, 1.0), (0.3, 0.0)])
def test_fidelity_is_its_formula_on_the_samplers_own_estimate(model: Any, fidelity: float, decay: float) -> None:
    latent = latents(batch=2)
    before_model, before = spied(model)
    patched, after = spied(faithful(before_model, latent, fidelity, decay))
    run(patched, latent, prompts=prompts_of(2))
    levels = sigmas(model, 3).double()
    z_lr = SCALE * latent["samples"].double()
    assert len(before.seen) == len(after.seen) == 3
    for step, (free, kept) in enumerate(zip(before.seen, after.seen, strict=True)):
        share = fidelity * (levels[step] / levels[0]) ** decay
        x0 = free["denoised"].double()
        torch.testing.assert_close(kept["denoised"].double(), x0 + share * (z_lr - x0), rtol=1e-5, atol=1e-5)


def prompts_of(batch: int) -> tuple[Any, Any]:
    """One prompt for all."""
    return prompts(seed=batch)


def test_full_fidelity_that_never_lets_go_gives_the_photo_back(model: Any) -> None:
    latent = latents()
    torch.testing.assert_close(run(faithful(model, latent, 1.0, 0.0), latent), latent["samples"], rtol=1e-5, atol=1e-4)


def test_more_fidelity_is_nearer_to_the_photo(model: Any) -> None:
    latent = latents(height=16, width=16)
    errors = [
        (run(faithful(model, latent, fidelity), latent) - latent["samples"]).square().mean().item()
        for fidelity in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_no_fidelity_is_the_plain_run_bit_for_bit(model: Any) -> None:
    latent = latents()
    plain = run(model, latent)
    assert torch.equal(run(faithful(model, latent, 0.0), latent), plain)
    run(faithful(model, latent, 0.7), latent)
    assert torch.equal(run(model, latent), plain), "the model itself was changed"


def test_a_second_dial_replaces_the_first(model: Any) -> None:
    latent = latents()
    twice = faithful(faithful(model, latent, 0.9), latent, 0.4)
    assert torch.equal(run(twice, latent), run(faithful(model, latent, 0.4), latent))


def test_fidelity_in_tiles_is_the_same_formula(model: Any) -> None:
    latent = latents(height=12, width=16)
    before_model, before = spied(model)
    patched, after = spied(faithful(before_model, latent, 0.6))
    sample_tiled(patched, noise(), sigmas(model, 2), latent)
    x0 = before.seen[0]["denoised"].double()
    expected = x0 + 0.6 * (SCALE * latent["samples"].double() - x0)
    torch.testing.assert_close(after.seen[0]["denoised"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_are_finite_in_every_precision(dtype: torch.dtype) -> None:
    latent = latents()
    patched = guided(faithful(nano_model(dtype=dtype), latent, 0.5), half(), feather=16)
    assert torch.isfinite(run(patched, latent)).all()


def test_a_latent_of_another_size_is_refused(model: Any) -> None:
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match="same SeeSR Latent Init"):
        run(faithful(model, latents(height=8), 0.5), latents(height=16))


@pytest.mark.parametrize("outside", [0.0, 0.25])
def test_guidance_is_its_formula_on_the_samplers_own_predictions(model: Any, outside: float) -> None:
    latent = latents(height=8, width=8)
    plain, free = spied(model)
    run(plain, latent, steps=1, cfg=4.0)
    patched, spy = spied(guided(model, half(), outside))
    run(patched, latent, steps=1, cfg=4.0)
    cond, uncond = (free.seen[0][name].double() for name in ("cond_denoised", "uncond_denoised"))
    share = torch.full((1, 1, 8, 8), outside, dtype=torch.float64)
    share[..., :4] = 1.0
    torch.testing.assert_close(
        spy.seen[0]["denoised"].double(), uncond + 4.0 * share * (cond - uncond), rtol=1e-5, atol=1e-4
    )
    assert torch.equal(spy.seen[0]["denoised"][..., :4], free.seen[0]["denoised"][..., :4]), "inside the mask"


def test_neutral_masks_are_the_plain_run_bit_for_bit(model: Any) -> None:
    latent = latents()
    plain = run(model, latent)
    assert torch.equal(run(guided(model, torch.ones(2, 40, 30), feather=16), latent), plain)
    assert torch.equal(run(guided(model, half(), outside=1.0), latent), plain)
    assert not torch.equal(run(guided(model, half()), latent), plain)
    assert torch.equal(run(model, latent), plain), "the model itself was changed"


def test_the_largest_of_several_masks_counts_whatever_their_size(model: Any) -> None:
    latent = latents()
    right = half(32, 16).flip(-1)
    left_and_a_bit = torch.cat([half(32, 16), right * 0.5])
    both = torch.cat([half(32, 16), right])
    assert torch.equal(run(guided(model, both), latent), run(model, latent))
    assert not torch.equal(run(guided(model, left_and_a_bit), latent), run(model, latent))


def test_in_a_batch_each_photo_is_guided_by_its_own_masks(model: Any) -> None:
    """As Ground Tags gives them for a batch: two masks of the first photo, one of the second, none of the third."""
    of_photos = plugin("nodes.host.photo_masks").of_photos
    left, right = half(32, 16), half(32, 16).flip(-1)
    latent = latents(batch=3)
    together = run(guided(model, of_photos(torch.cat([left, left * 0.5, right]), (2, 1, 0))), latent)
    alone = [run(guided(model, mask), latent) for mask in (left, right, torch.ones(1, 32, 16))]
    for photo in range(3):
        assert torch.equal(together[photo], alone[photo][photo])
    assert not torch.equal(alone[0][0], alone[1][0])
    plain = run(guided(model, torch.cat([left, right])), latent)
    assert torch.equal(plain, run(model, latent)), "masks of unknown photos count for every photo"


def test_guidance_in_tiles_looks_at_the_whole_mask(model: Any) -> None:
    latent = latents(height=8, width=24)
    mask = half(64, 192)
    plain, free = spied(model)
    sample_tiled(plain, noise(), sigmas(model, 1), latent)
    patched, spy = spied(guided(model, mask))
    sample_tiled(patched, noise(), sigmas(model, 1), latent)
    assert torch.equal(spy.seen[0]["denoised"][..., :12], free.seen[0]["denoised"][..., :12])
    assert torch.equal(spy.seen[0]["denoised"][..., 12:], free.seen[0]["uncond_denoised"][..., 12:])


def test_without_guidance_it_says_that_there_is_nothing_to_place(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    latent = latents()
    with caplog.at_level(logging.WARNING):
        found = run(guided(model, half()), latent, cfg=1.0)
    assert "at cfg 1 there is no guidance" in caplog.text
    assert torch.equal(found, run(model, latent, cfg=1.0))


def test_a_guider_that_leaves_it_out_is_named(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    positive, negative = prompts()
    latent = latents()
    patched = guided(model, half())
    guider = host_extras().Guider_DualCFG(patched)
    guider.set_conds(positive, prompts(1)[0], negative)
    guider.set_cfg(2.0, 3.0)
    with caplog.at_level(logging.WARNING):
        host_extras().SamplerCustomAdvanced().sample(noise(), guider, ddpm(), sigmas(model, 1), latent)
    assert "DualCFGGuider" in caplog.text


def test_they_chain_with_each_other_and_with_the_hosts_own() -> None:
    latent = latents()
    model = nano_model()
    chained = guided(faithful(rescaled(model), latent, 0.5), half())
    found = run(chained, latent)
    assert torch.isfinite(found).all()
    for other in (guided(rescaled(model), half()), faithful(rescaled(model), latent, 0.5), guided(model, half())):
        assert not torch.equal(found, run(other, latent))


def rescaled(model: Any) -> Any:
    """With RescaleCFG, which takes the host's one place for a guidance of its own."""
    from comfy_extras.nodes_model_advanced import RescaleCFG

    node = RescaleCFG()
    return outputs((getattr(node, "execute", None) or node.patch)(model, 0.7))[0]


def bad_masks() -> Iterator[tuple[Tensor, str]]:
    yield torch.ones(1, 8, 8, 3), r"of shape \(number, height, width\)"
    yield torch.zeros(0, 8, 8), r"of shape \(number, height, width\)"
    yield torch.full((1, 8, 8), torch.nan), "no numbers"
    yield torch.full((1, 8, 8), 255.0), "from 0 to 1"
    yield torch.full((1, 8, 8), -1.0), "from 0 to 1"


@pytest.mark.parametrize(("mask", "message"), list(bad_masks()))
def test_what_is_no_mask_is_refused(model: Any, mask: Tensor, message: str) -> None:
    with pytest.raises(plugin("seesr_core.errors").SettingsError, match=message):
        guided(model, mask)


def test_the_hosts_own_override_is_guidance_in_an_interval(model: Any) -> None:
    """cfg 1 before and after is what `cfg_start` and `cfg_end` are outside the host, step by step."""
    override = getattr(host_extras(), "CFGOverride", None)
    if override is None:
        pytest.skip("this host has no CFG Override")
    settings = plugin("seesr_core.settings").UpscaleSettings(steps=10, cfg=3.0, cfg_start=0.25, cfg_end=0.75)
    theirs = model
    for start, end in ((0.0, settings.cfg_start), (settings.cfg_end, 1.0)):
        theirs = outputs(override.execute(theirs, 1.0, start, end))[0]
    ours = plugin("nodes.host.steering").attach_guidance_interval(model, settings.cfg_start, settings.cfg_end)
    results = []
    for limited in (theirs, ours):
        with unet_inputs(limited) as seen:
            results.append(run(limited, latents(), steps=10))
        assert [len(x) for x in seen] == settings.halves()
    assert torch.equal(*results)


def test_the_whole_interval_is_no_interval(model: Any) -> None:
    attach = plugin("nodes.host.steering").attach_guidance_interval
    plain = run(model, latents())
    assert torch.equal(run(attach(attach(model, 0.5, 1.0), 0.0, 1.0), latents()), plain)
    assert not torch.equal(run(attach(model, 0.5, 1.0), latents()), plain)
