"""What tests of sampling share: nodes of the host's own, a U-Net's inputs, networks that are simple functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .locate import plugin
from .nets import LATENT_CHANNELS, nano_model

TEXT = 192


def host_extras() -> Any:
    """The host's own sampling nodes."""
    import comfy_extras.nodes_custom_sampler as extras

    return extras


def outputs(node_output: Any) -> Any:
    """What a node of either generation gives."""
    return getattr(node_output, "result", node_output)


def ddpm(name: str = "ddpm", **options: Any) -> Any:
    """A SAMPLER."""
    import comfy.samplers

    return comfy.samplers.ksampler(name, options)


def prompts(seed: int = 0) -> tuple[Any, Any]:
    """Positive and negative CONDITIONING of the small model's text width."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = ([[torch.randn(1, 77, TEXT, generator=generator), {}]] for _ in range(2))
    return positive, negative


def latents(batch: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> dict[str, Any]:
    """A LATENT as a VAE makes it."""
    generator = torch.Generator().manual_seed(seed)
    return {"samples": 5 * torch.randn(batch, LATENT_CHANNELS, height, width, generator=generator)}


def sigmas(model: Any, steps: int = 2, **options: Any) -> Tensor:
    """SIGMAS of the plugin's scheduler."""
    return plugin("nodes.latent").schedule_sigmas(model, steps=steps, **options)


def sample_tiled(model: Any, noise: Any, levels: Tensor, latent: Any, **options: Any) -> Tensor:
    """What SeeSRTiledSampler makes of a latent."""
    given = {"sampler": ddpm(), "cfg": 3.0, "tile_size": 64, "overlap": 16, **options}
    positive, negative = given.pop("prompts", None) or prompts()
    node = plugin("nodes.tiled").SeeSRTiledSampler
    return outputs(node.execute(model, positive, negative, noise, sigmas=levels, latent_image=latent, **given))[0][
        "samples"
    ]


def sample_stock(model: Any, noise: Any, levels: Tensor, latent: Any, **options: Any) -> Tensor:
    """What the host's SamplerCustomAdvanced makes of it."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*(options.get("prompts") or prompts()))
    guider.set_cfg(options.get("cfg", 3.0))
    node = host_extras().SamplerCustomAdvanced()
    return outputs(node.sample(noise, guider, options.get("sampler") or ddpm(), levels, latent))[0]["samples"]


@contextmanager
def unet_inputs(model: Any) -> Iterator[list[Tensor]]:
    """Every batch that the U-Net is given inside."""
    seen: list[Tensor] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        yield seen
    finally:
        hook.remove()


def function_model(function: Callable[[Tensor, dict[str, Any]], Tensor], model: Any = None) -> Any:
    """A MODEL whose denoised prediction is `function(x, arguments of the network)`."""
    model = (model or nano_model()).clone()
    model.set_model_unet_function_wrapper(lambda _, call: function(call["input"], call["c"]))
    return model


def noise(seed: int = 3) -> Any:
    """NOISE, a seed for each image."""
    return plugin("nodes.host.noise").ImageNoise(seed=seed)


def tokens(*values: float) -> Tensor:
    """Text states (B, 77, D) that are one number per image."""
    return torch.tensor(values)[:, None, None].expand(-1, 77, 192).contiguous()


def local(x: Tensor, c: dict[str, Any]) -> Tensor:
    """Looks at single cells only, so that tiles cannot change anything."""
    out = 0.5 * x + c["c_crossattn"].mean(dim=(1, 2))[:, None, None, None]
    if "field" in c:
        out = out + c["field"]
    for residual in (c.get("control") or {}).get("output", []):
        out = out + residual
    for features in (c.get("control") or {}).get("input", []):
        out = out + features
    return out
