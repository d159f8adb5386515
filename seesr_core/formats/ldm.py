"""Names of a U-Net's and a tiny autoencoder's weights in single-file checkpoints and in diffusers, in both directions.

The maps are tables of *modules* (`down_blocks.0.resnets.1.conv1` ↔ `input_blocks.2.0.in_layers.2`), made from a
diffusers config, so that any number of levels, layers and attention levels works. Below a transformer both layouts use
the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import WeightsError

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_STEM = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Module names of a diffusers `UNet2DConditionModel` → those of the LDM U-Net, for a text-to-image config."""
    table = dict(_STEM)
    table.update(_down_modules(config))
    table.update(_middle_modules())
    table.update(_up_modules(config))
    return table


def unet_to_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A diffusers U-Net state dict under LDM names (without prefix).

    Raises:
        WeightsError: a key that the config's U-Net does not have.
    """
    return _rename(state, unet_modules(config))


def unet_from_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inverse of `unet_to_ldm`.

    Raises:
        WeightsError: a key that the config's U-Net does not have.
    """
    return _rename(state, {ldm: name for name, ldm in unet_modules(config).items()})


def taesd_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An `AutoencoderTiny` state dict under TAESD's names; its decoder counts the clamp in front as layer 0."""
    return _moved_layers(state, ("encoder.layers.", "taesd_encoder.", 0), ("decoder.layers.", "taesd_decoder.", 1))


def taesd_from_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `taesd_to_ldm`; other keys (`vae_scale`, `vae_shift`) are left out."""
    return _moved_layers(state, ("taesd_encoder.", "encoder.layers.", 0), ("taesd_decoder.", "decoder.layers.", -1))


def _moved_layers(state: Mapping[str, Tensor], *moves: tuple[str, str, int]) -> dict[str, Tensor]:
    """Numbered layers under other names, each move an old prefix, the new one, and what is added to the numbers."""
    moved = {}
    for old, new, shift in moves:
        for key in filter(lambda key: key.startswith(old), state):
            index, _, rest = key.removeprefix(old).partition(".")
            moved[f"{new}{int(index) + shift}.{rest}"] = state[key]
    return moved


def _rename(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    return {_rename_key(key, table): tensor for key, tensor in state.items()}


def _rename_key(key: str, table: Mapping[str, str]) -> str:
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = table.get(".".join(parts[:length]))
        if module is not None:
            return ".".join([module, *parts[length:]])
    raise WeightsError(f"The U-Net weight {key!r} has no place in a single-file checkpoint of this configuration.")


def _down_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    block = 1
    kinds = config["down_block_types"]
    for level, (kind, layers) in enumerate(zip(kinds, layers_by_level(config), strict=True)):
        for layer in range(layers):
            yield from _layer_modules(
                f"down_blocks.{level}", layer, f"input_blocks.{block}", attention="CrossAttn" in kind
            )
            block += 1
        if level < len(kinds) - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{block}.0.op"
            block += 1


def _middle_modules() -> Iterator[tuple[str, str]]:
    yield from _resnet_modules("mid_block.resnets.0", "middle_block.0")
    yield "mid_block.attentions.0", "middle_block.1"
    yield from _resnet_modules("mid_block.resnets.1", "middle_block.2")


def _up_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    block = 0
    kinds = config["up_block_types"]
    for level, (kind, layers) in enumerate(zip(kinds, reversed(layers_by_level(config)), strict=True)):
        attention = "CrossAttn" in kind
        for layer in range(layers + 1):
            yield from _layer_modules(f"up_blocks.{level}", layer, f"output_blocks.{block}", attention=attention)
            block += 1
        if level < len(kinds) - 1:
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{block - 1}.{1 + attention}.conv"


def _layer_modules(block: str, layer: int, ldm: str, *, attention: bool) -> Iterator[tuple[str, str]]:
    yield from _resnet_modules(f"{block}.resnets.{layer}", f"{ldm}.0")
    if attention:
        yield f"{block}.attentions.{layer}", f"{ldm}.1"


def _resnet_modules(resnet: str, ldm: str) -> Iterator[tuple[str, str]]:
    return ((f"{resnet}.{name}", f"{ldm}.{old}") for name, old in _RESNET.items())


def layers_by_level(config: Mapping[str, Any]) -> list[int]:
    """`layers_per_block` of every level, from the outermost in."""
    layers = config["layers_per_block"]
    return [layers] * len(config["down_block_types"]) if isinstance(layers, int) else list(layers)
