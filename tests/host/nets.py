"""Small models in the host's own classes: the shipped one, and any that a diffusers configuration describes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .locate import PLUGIN, plugin
from .small_nodes import load_checkpoint

NANO = PLUGIN / "seesr_core" / "nano"


def _latent_channels() -> int:
    with safe_open(NANO / "checkpoints" / "seesr-nano.safetensors", "pt") as file:
        shape: list[int] = file.get_slice("model.diffusion_model.input_blocks.0.0.weight").get_shape()
    return shape[1]


LATENT_CHANNELS = _latent_channels()
"""Of the shipped model."""


def host_model(
    config: Mapping[str, Any], state: Mapping[str, Tensor] | None, *, family: str = "SD20", **changes: Any
) -> Any:
    """A MODEL: the host's patcher around its U-Net of a diffusers `config`, noise-predicting.

    Args:
        config: diffusers U-Net config.
        state: weights under the host's names; the model takes these tensors as they are. None: whatever was in memory.
        family: the host's class of models.
        changes: entries of the host's own U-Net config to set otherwise, such as `dtype`.
    """
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    keys, rca = plugin("nodes.host.keys"), plugin("nodes.host.rca")
    entries = {**keys.host_config(config), "out_channels": config["out_channels"], "dtype": torch.float32, **changes}
    model_config = getattr(comfy.supported_models, family)(entries)
    # Stable Diffusion 2's class sets its own head width; a small model has others.
    model_config.unet_config.update(entries)
    if config["in_channels"] == LATENT_CHANNELS != 4:
        model_config.latent_format = plugin("nodes.host.nano").CosineLatent()
    model_config.manual_cast_dtype = None if entries["dtype"] == torch.float32 else torch.float32
    model_config.custom_operations = rca.norm_operations(comfy.ops.manual_cast, config.get("norm_num_groups", 32))
    model = comfy.model_base.BaseModel(model_config, comfy.model_base.ModelType.EPS)
    if state is not None:
        model.diffusion_model.load_state_dict(state, assign=True)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@functools.cache
def _nano_checkpoint() -> dict[str, Tensor]:
    prefix = "model.diffusion_model."
    tensors = load_file(NANO / "checkpoints" / "seesr-nano.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def nano_model(**changes: Any) -> Any:
    """The shipped base model's U-Net as a fresh MODEL."""
    dtype = changes.get("dtype", torch.float32)
    state = {key: tensor.to(dtype, copy=True) for key, tensor in _nano_checkpoint().items()}
    read_config = plugin("seesr_core.formats.unet_config").unet_config_from_ldm
    return host_model(read_config({key: tuple(t.shape) for key, t in state.items()}, "nano"), state, **changes)


def nano_config() -> dict[str, Any]:
    """diffusers config of the shipped U-Net."""
    return dict(nano_parts().unet_config)


@functools.cache
def nano_parts() -> Any:
    """The shipped trained part as plain data."""
    path = NANO / "seesr" / "seesr-nano-control.safetensors"
    return plugin("seesr_core.formats.control").read_control(path)


@functools.cache
def nano_seesr() -> Any:
    """The shipped SEESR_MODEL."""
    return plugin("nodes.host.seesr_model").build_seesr_model(nano_parts(), name="nano")


@functools.cache
def nano_clip() -> Any:
    """The shipped CLIP."""
    return load_checkpoint(plugin("nodes.host.nano").EMBEDDED)["clip"]


@functools.cache
def nano_tagger() -> Any:
    """The shipped SEESR_DAPE."""
    return plugin("nodes.host.dape").load_dape(NANO / "dape" / "dape-nano.safetensors")


def forget() -> None:
    """Let go of what is kept."""
    for kept in (nano_seesr, nano_clip, nano_tagger):
        kept.cache_clear()


def nano_inputs(batch: int = 1, size: int = 16, seed: int = 0) -> dict[str, Any]:
    """What goes with the shipped model: conditionings, soft prompts, prepared images, latents, noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text, soft = nano_parts().unet_config["cross_attention_dim"], nano_parts().context_dim
    return {
        "positive": [[[normal(1, 77, text), {}]] for _ in range(batch)],
        "negative": [[normal(1, 77, text), {}]],
        "soft_prompt": normal(batch, 17, soft),
        "image": torch.rand(batch, 8 * size, 8 * size, 3, generator=generator),
        "latent": normal(batch, LATENT_CHANNELS, size, size),
        "noise": normal(batch, LATENT_CHANNELS, size, size),
    }


def run(
    model: Any, positive: Any, negative: Any, inputs: Mapping[str, Any], *, cfg: float = 3.0, steps: int = 2
) -> Tensor:
    """A short deterministic run of the host's own sampler: latents (B, 4, h, w)."""
    import comfy.sample
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    sampler = comfy.samplers.ksampler("euler")
    noise, latent = inputs["noise"], inputs["latent"]
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=0
    )
