"""diffusers' (the published) names and configs as the host's, for U-Nets of Stable Diffusion 2's kind and any size.

A host's block is `("input" | "middle" | "output", index)`, as in `transformer_options["block"]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...seesr_core.errors import WeightsError

Block = tuple[str, int]

NORM_GROUPS = 32
"""Groups of a norm where a config names none."""

# What the host's networks take for granted, as diffusers calls it; a config without an entry means the same.
_ASSUMED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_scale_factor": (1, 1.0),
    "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A place where RCA sits: after the text transformer of a block."""

    block: Block
    """The host's block."""
    channels: int
    """Width of the picture there."""
    heads: int
    """Attention heads there, as many as the text transformer's."""

    @property
    def name(self) -> str:
        """The block's name as part of a module's name, such as `input_4`."""
        return f"{self.block[0]}_{self.block[1]}"


def host_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers U-Net or ControlNet config as arguments that the host's `UNetModel` and `cldm.ControlNet` share.

    Raises:
        WeightsError: a network that the host's classes cannot be.
    """
    for name, accepted in _ASSUMED.items():
        if name in config and config[name] not in accepted:
            raise WeightsError(
                f"The host's networks need {name} to be {accepted[0]!r}, this model has {config[name]!r}."
            )
    widths, layers = _widths(config), _per_level(config.get("layers_per_block", 2), config)
    depths = _depths(config, "down_block_types")
    # A ControlNet has no upper half, but the host's key map walks one.
    up = _depths(config, "up_block_types")[::-1] if "up_block_types" in config else [0] * len(depths)
    return {
        "image_size": 32,
        "in_channels": config.get("in_channels", 4),
        "model_channels": widths[0],
        "num_res_blocks": layers,
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": [depth for depth, count in zip(depths, layers, strict=True) for _ in range(count)],
        "transformer_depth_output": [depth for depth, count in zip(up, layers, strict=True) for _ in range(count + 1)],
        "transformer_depth_middle": _per_level(config.get("transformer_layers_per_block", 1), config)[-1],
        "context_dim": config["cross_attention_dim"],
        "use_linear_in_transformer": bool(config.get("use_linear_projection", False)),
        "use_spatial_transformer": True,
        "legacy": False,
        # Stable Diffusion 2 overflows half precision here; float32 costs the small networks nothing.
        "attn_precision": torch.float32,
        **_head_arguments(config, depths),
    }


def sites(config: Mapping[str, Any]) -> dict[str, Site]:
    """Where RCA sits, by diffusers' prefix (`down_blocks.0.image_attentions.1`)."""
    widths, heads = _widths(config), _heads(config)
    found = {}
    for theirs, ours in _key_map(config).items():
        block, marker, rest = theirs.partition(".attentions.")
        index, _, leaf = rest.partition(".")
        if marker and leaf == "norm.weight":
            level = _level(block, len(widths))
            site = Site(block=_block(ours), channels=widths[level], heads=heads[level])
            found[f"{block}.image_attentions.{index}"] = site
    return found


def rca_to_host(state: Mapping[str, Tensor], places: Mapping[str, Site]) -> dict[str, Tensor]:
    """`…image_attentions…` weights under the names of `nodes.host.rca.RCA`.

    Raises:
        WeightsError: weights for a site that the configuration does not have.
    """
    renamed = {}
    for key, tensor in state.items():
        block, _, rest = key.partition(".image_attentions.")
        index, _, leaf = rest.partition(".")
        site = places.get(f"{block}.image_attentions.{index}")
        if site is None:
            raise WeightsError(f"The weights hold RCA at {key}, but the configuration has no text attention there.")
        renamed[f"transformers.{site.name}.{leaf}"] = tensor
    return renamed


def controlnet_to_host(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A diffusers ControlNet's weights, RCA included, under the names of `nodes.host.control.SeeSRControlNet`.

    Raises:
        WeightsError: a weight that has no place in the host's network.
    """
    names = _key_map(config) | _controlnet_names(state)
    rca = {key: tensor for key, tensor in state.items() if ".image_attentions." in key}
    others = {key: tensor for key, tensor in state.items() if key not in rca}
    unknown = sorted(others.keys() - names.keys())
    if unknown:
        raise WeightsError(f"The ControlNet's weights hold {unknown[0]}, which its configuration does not describe.")
    renamed = {names[key]: tensor for key, tensor in others.items()}
    return renamed | {f"rca.{key}": tensor for key, tensor in rca_to_host(rca, sites(config)).items()}


def unet_to_host(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A diffusers U-Net's weights, RCA left out, under the names of the host's `UNetModel`."""
    names = _key_map(config)
    return {names[key]: tensor for key, tensor in state.items() if ".image_attentions." not in key}


def _key_map(config: Mapping[str, Any]) -> dict[str, str]:
    return comfy.utils.unet_to_diffusers(host_config(config))


def _controlnet_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of a ControlNet's own layers: image encoder, output convolutions."""
    blocks = sum(key.startswith("controlnet_cond_embedding.blocks.") and key.endswith(".weight") for key in state)
    outputs = sum(key.startswith("controlnet_down_blocks.") and key.endswith(".weight") for key in state)
    # Activations lie between the convolutions of the host's image encoder, so every second index is one.
    stems = {"controlnet_cond_embedding.conv_in": "input_hint_block.0", "controlnet_mid_block": "middle_block_out.0"}
    stems |= {f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(blocks)}
    stems |= {"controlnet_cond_embedding.conv_out": f"input_hint_block.{2 * blocks + 2}"}
    stems |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(outputs)}
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in stems.items() for kind in ("weight", "bias")}


def _block(host_key: str) -> Block:
    stem, _, rest = host_key.partition("_block")
    return stem, 0 if stem == "middle" else int(rest.split(".")[1])


def _level(diffusers_block: str, levels: int) -> int:
    """Level 0 is the finest; the upper half counts from the coarsest."""
    if diffusers_block == "mid_block":
        return levels - 1
    half, _, index = diffusers_block.partition(".")
    return int(index) if half == "down_blocks" else levels - 1 - int(index)


def _widths(config: Mapping[str, Any]) -> list[int]:
    widths = list(config["block_out_channels"])
    if any(width % widths[0] for width in widths):
        raise WeightsError(
            f"The host's networks need channels that are multiples of the first, this model has {widths}."
        )
    return widths


def _depths(config: Mapping[str, Any], types: str) -> list[int]:
    """Transformer layers per level in the order of `types`; 0 where a level has no attention."""
    depths = _per_level(config.get("transformer_layers_per_block", 1), config)
    depths = depths if types == "down_block_types" else depths[::-1]
    return [depth if "CrossAttn" in kind else 0 for depth, kind in zip(depths, config[types], strict=True)]


def _heads(config: Mapping[str, Any]) -> list[int]:
    # diffusers' `attention_head_dim` is the number of heads, by an old mistake that its files still carry.
    return _per_level(config.get("num_attention_heads") or config["attention_head_dim"], config)


def _head_arguments(config: Mapping[str, Any], depths: list[int]) -> dict[str, int]:
    """The host knows one width of a head, or one number of heads, for all levels."""
    levels = [(w, h) for w, h, depth in zip(_widths(config), _heads(config), depths, strict=True) if depth]
    # The middle block attends even where the last level does not.
    levels.append((_widths(config)[-1], _heads(config)[-1]))
    if len({width // heads for width, heads in levels}) == 1:
        return {"num_heads": -1, "num_head_channels": levels[0][0] // levels[0][1]}
    if len({heads for _, heads in levels}) == 1:
        return {"num_heads": levels[0][1], "num_head_channels": -1}
    raise WeightsError(
        "The host's networks need heads of one width, or one number of heads, at all levels; this model has (channels, "
        f"heads) of {levels}."
    )


def _per_level(value: Any, config: Mapping[str, Any]) -> list[int]:
    return [value] * len(config["block_out_channels"]) if isinstance(value, int) else list(value)
