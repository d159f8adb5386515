"""The host's samplers with step noise of each image's own seed, and the run of one, refused early if it cannot work."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.k_diffusion.sampling as k_diffusion
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...seesr_core.errors import SettingsError
from ..schema import require_finite
from .noise import ImageNoise, LRENoise, image_seeds
from .noise_levels import check_sigmas

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
"""A sampler's source of step noise, called with the noise levels before and after the step."""

_BROWNIAN = ("sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_2m_sde_heun", "sample_dpmpp_3m_sde")
"""The host's samplers whose step noise is a Brownian path; each has a twin with the suffix `_gpu`."""


def sample(
    model: Any,
    positive: Any,
    negative: Any,
    noise: Any,
    sampler: Any,
    sigmas: Tensor,
    latent: Mapping[str, Any],
    *,
    cfg: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sample as the host's SamplerCustomAdvanced does, image i of a batch with all noise from seed + i.

    Returns:
        The sampled LATENT and the one last estimated.

    Raises:
        SettingsError: a latent, sigmas or noise that cannot be sampled.
    """
    latent = _with_channels(model, latent)
    check_latent(model, latent)
    check_sigmas(sigmas)
    if isinstance(noise, LRENoise):
        noise.check_start(sigmas)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sampler = per_image_sampler(sampler, image_seeds(noise.seed, latent))
    return _host_node(per_image_noise(noise), guider, sampler, sigmas, latent)


def _host_node(*inputs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    # The host's own node knows this host's previews, empty latents and devices.
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    given = SamplerCustomAdvanced().sample(*inputs)
    latent, denoised = getattr(given, "result", given)
    return latent, denoised


def _with_channels(model: Any, latent: Mapping[str, Any]) -> dict[str, Any]:
    """The LATENT; an empty one, which the host's nodes make of four channels, with those of the model, as they do."""
    samples = latent["samples"]
    if not getattr(samples, "is_nested", False) and samples.ndim == 4 and samples.numel():
        samples = comfy.sample.fix_empty_latent_channels(model, samples)
    return {**latent, "samples": samples}


def check_latent(model: Any, latent: Mapping[str, Any]) -> None:
    """Raise SettingsError unless `latent` holds finite latents (B, C, h, w) of the model's channel count."""
    samples = latent["samples"]
    channels = model.get_model_object("latent_format").latent_channels
    if getattr(samples, "is_nested", False) or samples.ndim != 4 or samples.shape[1] != channels or not samples.numel():
        found = "several in one" if getattr(samples, "is_nested", False) else f"shape {tuple(samples.shape)}"
        raise SettingsError(
            f"Expected a LATENT of pictures with {channels} channels (batch, {channels}, height, width), found "
            f"{found}; encode the picture with the VAE of the model's own checkpoint."
        )
    require_finite(
        samples,
        "The LATENT",
        "check the node it comes from, often a VAE that does not work in half precision (start the host with "
        "--fp32-vae)",
    )


def per_image_noise(noise: Any) -> Any:
    """The host's random noise with a seed for each image; other NOISE objects as they are.

    For a single image both draw the same. The host loads its nodes under a module name of its own, so that the class
    can be told by its name only.
    """
    return ImageNoise(seed=noise.seed) if type(noise).__name__ == "Noise_RandomNoise" else noise


def per_image_sampler(sampler: Any, seeds: Sequence[int]) -> Any:
    """A SAMPLER that gives image i the step noise that the host would give it alone with seed `seeds[i]`.

    Samplers that draw no noise, or take none from outside, are given back as they are; so are those that already were
    given a noise source.
    """
    if type(sampler) is not comfy.samplers.KSAMPLER or sampler.extra_options.get("noise_sampler") is not None:
        return sampler
    if "noise_sampler" not in inspect.signature(sampler.sampler_function).parameters:
        return sampler
    function = _with_image_noise(sampler.sampler_function, seeds)
    return comfy.samplers.KSAMPLER(function, sampler.extra_options, sampler.inpaint_options)


def _with_image_noise(function: Callable[..., Tensor], seeds: Sequence[int]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def sample_with_image_noise(model: Any, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        source = image_noise_sampler(getattr(function, "__name__", ""), x, sigmas, seeds)
        return function(model, x, sigmas, **{**options, "noise_sampler": source})

    return sample_with_image_noise


def image_noise_sampler(name: str, x: Tensor, sigmas: Tensor, seeds: Sequence[int]) -> NoiseSampler:
    """The noise source of sampler function `name`, for each image of `x` (B, …) that of a run by itself."""
    sources = [_host_noise_sampler(name, row[None], sigmas, seed) for row, seed in zip(x, seeds, strict=True)]
    return lambda sigma, following: torch.cat([source(sigma, following) for source in sources])


def _host_noise_sampler(name: str, x: Tensor, sigmas: Tensor, seed: int) -> NoiseSampler:
    stem = name.removesuffix("_gpu")
    source: NoiseSampler
    if stem in _BROWNIAN and len(sigmas) > 1:
        lowest, highest = sigmas[sigmas > 0].min(), sigmas.max()
        source = k_diffusion.BrownianTreeNoiseSampler(x, lowest, highest, seed=seed, cpu=name == stem)
    else:
        source = k_diffusion.default_noise_sampler(x, seed=seed)
    return source
