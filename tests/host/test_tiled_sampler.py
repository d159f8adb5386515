"""SeeSRTiledSampler: each image's noise, masks, outputs, progress and wrong plugs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .locate import plugin
from .nets import LATENT_CHANNELS, nano_model
from .sampling import (
    ddpm,
    function_model,
    host_extras,
    latents,
    outputs,
    prompts,
    sample_stock,
    sample_tiled,
    sigmas,
)

# Its step length depends on the errors of all images of a batch.
COUPLED = {"dpm_adaptive"}


def random_noise(seed: int) -> Any:
    return outputs(host_extras().RandomNoise().get_noise(seed))[0]


def lre(model: Any, levels: Tensor, seed: int) -> Any:
    return plugin("nodes.host.noise").LRENoise.for_model(model, levels, seed=seed)


def shrink(x: Tensor, _: Any) -> Tensor:
    return 0.7 * torch.tanh(x)


def one(latent: dict[str, Any], i: int) -> dict[str, Any]:
    return {"samples": latent["samples"][i : i + 1]}


def test_every_sampler_gives_a_single_image_what_the_host_gives_it():
    """The step noise of our own is the host's, whichever sampler draws it."""
    import comfy.samplers

    model, latent = function_model(shrink), latents()
    levels = sigmas(model, steps=3)
    differing = []
    for name in comfy.samplers.SAMPLER_NAMES:
        sampler = comfy.samplers.sampler_object(name)
        stock = sample_stock(model, random_noise(11), levels, latent, sampler=sampler)
        ours = sample_tiled(model, random_noise(11), levels, latent, sampler=sampler)
        if not torch.equal(stock, ours):
            differing.append(name)
    assert differing == []


def test_a_batch_is_single_runs_for_every_sampler():
    import comfy.samplers

    model, latent = function_model(shrink), latents(2)
    levels = sigmas(model, steps=3)
    differing = []
    for name in comfy.samplers.SAMPLER_NAMES:
        sampler = comfy.samplers.sampler_object(name)
        batch = sample_tiled(model, random_noise(11), levels, latent, sampler=sampler)
        single = [sample_tiled(model, random_noise(11 + i), levels, one(latent, i), sampler=sampler) for i in range(2)]
        if not torch.allclose(batch, torch.cat(single), rtol=0, atol=1e-4):
            differing.append(name)
    assert set(differing) <= COUPLED


def test_a_tiled_batch_of_the_real_network_is_single_runs():
    model, latent = nano_model(), latents(2, 8, 16)
    levels = sigmas(model, steps=2)
    batch = sample_tiled(model, lre(model, levels, 4), levels, latent, tile_batch=2)
    single = [sample_tiled(model, lre(model, levels, 4 + i), levels, one(latent, i)) for i in range(2)]
    assert torch.allclose(batch, torch.cat(single), rtol=0, atol=1e-4 * float(batch.abs().max()))
    assert (single[0] - single[1]).abs().max() > 0.1


def test_an_image_taken_from_a_batch_keeps_its_noise():
    model, latent = function_model(shrink), latents(3)
    levels = sigmas(model, steps=2)
    batch = sample_tiled(model, lre(model, levels, 4), levels, latent)
    second = {**one(latent, 1), "batch_index": [1]}
    assert torch.equal(sample_tiled(model, lre(model, levels, 4), levels, second), batch[1:2])


def test_a_noise_source_that_the_sampler_already_has_is_kept():
    drawn = []

    def zeros(sigma: Tensor, following: Tensor) -> Tensor:
        drawn.append(float(sigma))
        return torch.zeros(1, LATENT_CHANNELS, 8, 8)

    model, latent = function_model(shrink), latents()
    levels = sigmas(model, steps=3)
    given = ddpm(noise_sampler=zeros)
    sampled = sample_tiled(model, random_noise(1), levels, latent, sampler=given)
    assert drawn == levels[:2].tolist()  # the host draws none at the last step
    assert torch.equal(sampled, sample_stock(model, random_noise(1), levels, latent, sampler=given))


def test_the_given_sampler_is_left_as_it_is():
    sampler = ddpm()
    function, options = sampler.sampler_function, dict(sampler.extra_options)
    model = function_model(shrink)
    sample_tiled(model, random_noise(1), sigmas(model), latents(), sampler=sampler)
    assert sampler.sampler_function is function
    assert sampler.extra_options == options


def test_a_sampler_of_another_class_is_used_as_it_is():
    import comfy.samplers

    class Own(comfy.samplers.Sampler):
        def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *rest: Any):
            return torch.full_like(noise, 0.5)

    model = function_model(shrink)
    sampled = sample_tiled(model, random_noise(1), sigmas(model), latents(), sampler=Own())
    assert torch.allclose(sampled, torch.full_like(sampled, 0.5 / 0.18215))


def test_noise_masks_are_respected_and_handed_on():
    model, latent = function_model(shrink), latents(1, 8, 20)
    latent["noise_mask"] = torch.zeros(1, 1, 64, 160)
    latent["noise_mask"][..., 80:] = 1.0
    levels = sigmas(model, steps=2)
    node = plugin("nodes.tiled").SeeSRTiledSampler
    positive, negative = prompts()
    out, denoised = outputs(
        node.execute(model, positive, negative, lre(model, levels, 1), ddpm(), levels, latent, tile_size=64)
    )
    assert torch.allclose(out["samples"][..., :10], latent["samples"][..., :10], atol=1e-4)
    assert not torch.allclose(out["samples"][..., 10:], latent["samples"][..., 10:], atol=1e-1)
    assert torch.equal(out["noise_mask"], latent["noise_mask"])
    assert torch.equal(denoised["noise_mask"], latent["noise_mask"])


def test_both_outputs_where_sigmas_end_early():
    model, latent = function_model(shrink), latents(1, 8, 20)
    levels = sigmas(model, steps=4)[:3]
    node = plugin("nodes.tiled").SeeSRTiledSampler
    out, denoised = outputs(
        node.execute(model, *prompts(), lre(model, levels, 1), ddpm(), levels, latent, tile_size=64)
    )
    assert out["samples"].shape == denoised["samples"].shape == latent["samples"].shape
    # The estimate of `shrink` is bounded, what is still noisy is not.
    assert denoised["samples"].abs().max() <= 0.71 / 0.18215
    assert out["samples"].std() > denoised["samples"].std()


def test_progress_counts_the_steps(monkeypatch):
    import comfy.utils

    told = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: told.append((value, total)))
    model = function_model(shrink)
    sample_tiled(model, random_noise(1), sigmas(model, steps=3), latents(1, 8, 20))
    # The host leaves out what comes too soon after the one before.
    assert told[0] == (1, 3)
    assert told[-1] == (3, 3)


def test_seesr_in_tiles_reads_the_hint_under_each_tile():
    """With ControlNet and RCA of the shipped model: what does not touch a tile cannot change what only it covers."""
    from .nets import nano_inputs, nano_seesr

    given = nano_inputs()
    image = torch.rand(1, 64, 160, 3, generator=torch.Generator().manual_seed(0))
    other = image.clone()
    other[:, :, 96:] = 1 - other[:, :, 96:]
    model, latent = nano_model(), latents(1, 8, 20)
    levels = sigmas(model, steps=1)

    def run(photo: Tensor) -> Tensor:
        apply = plugin("nodes.apply").apply_seesr
        patched, positive, negative = apply(
            model, given["positive"], [given["negative"]], nano_seesr(), given["soft_prompt"], photo
        )
        noise = lre(model, levels, 1)
        return sample_tiled(patched, noise, levels, latent, prompts=(positive, negative), overlap=16)

    first, second = run(image), run(other)
    # Tiles of 8 cells at columns 0, 6 and 12; those up to column 12 see none of the picture from cell 12 on.
    assert torch.allclose(first[..., :6], second[..., :6], atol=1e-5)
    assert (first - second)[..., 14:].abs().max() > 1e-2


def refusal(match: str) -> Any:
    return pytest.raises(plugin("seesr_core.errors").SettingsError, match=match)


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        (torch.full((1, LATENT_CHANNELS, 8, 8), float("nan")), "LATENT holds values that are no numbers"),
        (torch.ones(1, 5, 8, 8), rf"with {LATENT_CHANNELS} channels .* found shape \(1, 5, 8, 8\)"),
        (torch.zeros(1, LATENT_CHANNELS, 2, 8, 8), "LATENT of pictures"),
        (torch.zeros(0, LATENT_CHANNELS, 8, 8), "LATENT of pictures"),
    ],
)
def test_latents_that_cannot_be_sampled_are_refused(samples, match):
    model = nano_model()
    with refusal(match):
        sample_tiled(model, random_noise(1), sigmas(model), {"samples": samples})


@pytest.mark.parametrize(
    ("values", "match"), [([], "at least one step"), ([0.0, 1.0], "that fall"), ([3.0, 1.0, 2.0, 0.0], "that fall")]
)
def test_sigmas_that_do_not_fall_are_refused(values, match):
    with refusal(match):
        sample_tiled(nano_model(), random_noise(1), torch.tensor(values), latents())


def test_noise_made_for_other_sigmas_is_refused():
    model = nano_model()
    with refusal("begin at 8.391, the sampler's begin at 13.12; connect the same SIGMAS"):
        sample_tiled(model, lre(model, sigmas(model, steps=10), 1), sigmas(model, steps=50), latents())


def test_a_batch_index_of_another_batch_is_refused():
    model = function_model(shrink)
    with refusal("holds 2 images but the batch places of 1"):
        sample_tiled(model, lre(model, sigmas(model), 1), sigmas(model), {**latents(2), "batch_index": [0]})
