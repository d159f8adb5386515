"""A U-Net's diffusers config, read from the shapes of an LDM state dict, and what a host can detect of it.

Two numbers leave no trace in the shapes and are Stable Diffusion 2's: 64 channels a head and 32 groups a norm.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError, WeightsError

HEAD_CHANNELS = 64
NORM_GROUPS = 32

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(kw_only=True, slots=True)
class _Level:
    channels: int = 0
    layers: int = 0
    depth: int = 0


def unet_config_from_ldm(shapes: Shapes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The diffusers config of an LDM U-Net.

    Args:
        shapes: LDM keys without prefix → sizes.
        path: the file they are from, for messages.

    Raises:
        WeightsError: keys that make no U-Net, or one whose levels are not uniform.
    """
    levels = _levels(shapes, path)
    attention = [level.depth > 0 for level in levels]
    first_text = next((key for key in shapes if key.endswith("attn2.to_k.weight")), None)
    needed = ("input_blocks.0.0.weight", "out.2.weight", "middle_block.1.proj_in.weight")
    if first_text is None or any(len(shapes.get(key, ())) < 2 for key in (*needed, first_text)):
        raise WeightsError(f"{path}: expected a U-Net with text attention in its middle block, found none.")
    channels = [level.channels for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": _one_or_all([level.layers for level in levels]),
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "cross_attention_dim": shapes[first_text][1],
        "attention_head_dim": [max(1, width // HEAD_CHANNELS) for width in channels],
        "transformer_layers_per_block": _one_or_all([max(1, level.depth) for level in levels]),
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
        "norm_num_groups": NORM_GROUPS,
    }


def check_host_can_read(config: Mapping[str, Any]) -> None:
    """A single-file checkpoint carries no config, so a U-Net must have the values that readers assume.

    Raises:
        SettingsError: another number of channels a head, groups a norm, or widths that are no multiples of the first.
    """
    widths, groups = list(config["block_out_channels"]), config.get("norm_num_groups", 32)
    if groups != NORM_GROUPS or any(width % NORM_GROUPS for width in widths):
        raise SettingsError(
            f"A single-file U-Net needs norms of {NORM_GROUPS} groups; found {groups} with channels {widths}."
        )
    if any(width % widths[0] for width in widths):
        raise SettingsError(
            f"A single-file U-Net needs channels that are multiples of the first level's; found {widths}."
        )
    for width, kind, heads in zip(widths, config["down_block_types"], _heads(config), strict=True):
        if "CrossAttn" in kind and heads * HEAD_CHANNELS != width:
            raise SettingsError(
                f"A single-file U-Net needs {HEAD_CHANNELS} channels a head; found {heads} heads at {width} channels."
            )


def _heads(config: Mapping[str, Any]) -> list[int]:
    # diffusers' `attention_head_dim` is the number of heads, by an old mistake that its files still carry.
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    return [heads] * len(config["block_out_channels"]) if isinstance(heads, int) else list(heads)


def _levels(shapes: Shapes, path: str | os.PathLike[str]) -> list[_Level]:
    """Walk the input blocks: a downsampling convolution closes a level."""
    levels, block = [_Level()], 1
    while True:
        stem = f"input_blocks.{block}.0"
        if f"{stem}.op.weight" in shapes:
            levels.append(_Level())
        elif f"{stem}.out_layers.3.weight" in shapes:
            _add_layer(levels[-1], shapes, block, path)
        else:
            break
        block += 1
    if any(level.layers == 0 for level in levels):
        raise WeightsError(f"{path}: expected a U-Net with residual layers at every level, found {len(levels)} levels.")
    return levels


def _add_layer(level: _Level, shapes: Shapes, block: int, path: str | os.PathLike[str]) -> None:
    channels = (shapes[f"input_blocks.{block}.0.out_layers.3.weight"] or (0,))[0]
    depth = 0
    while f"input_blocks.{block}.1.transformer_blocks.{depth}.attn1.to_q.weight" in shapes:
        depth += 1
    if level.layers and (channels, depth) != (level.channels, level.depth):
        raise WeightsError(
            f"{path}: the layers of one U-Net level differ at input block {block}; such a U-Net is not supported."
        )
    level.channels, level.depth, level.layers = channels, depth, level.layers + 1


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
