"""The fixtures' networks in the host's own classes, with weights by the rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...host.locate import plugin
from ...host.nets import host_model
from ..groups.unet_controlnet import read_json
from ..weights import read_key_shapes, rule_state_dict


def rule_made(folder: Path, kind: str, salts: tuple[str, str]) -> tuple[Any, Any]:
    """MODEL and SEESR_MODEL.

    Args:
        folder: where `{kind}_unet_config.json`, `{kind}_unet_keys.json.gz` and the ControlNet's lie.
        kind: `tiny` or `full`.
        salts: of the U-Net's and the ControlNet's weights.
    """
    unet_config, unet = _weights(folder, f"{kind}_unet", salts[0])
    controlnet_config, controlnet = _weights(folder, f"{kind}_controlnet", salts[1])
    rca = {key: tensor for key, tensor in unet.items() if ".image_attentions." in key}
    parts = plugin("seesr_core.formats.control").ControlParts(
        unet_config=unet_config,
        controlnet_config=controlnet_config,
        controlnet_state=controlnet,
        rca_state=rca,
        context_dim=next(t.shape[1] for key, t in rca.items() if key.endswith("attn2.to_k.weight")),
        base="the golden networks",
    )
    seesr = plugin("nodes.host.seesr_model").build_seesr_model(parts, name=kind)
    return host_model(unet_config, plugin("nodes.host.keys").unet_to_host(unet, unet_config)), seesr


def _weights(folder: Path, stem: str, salt: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return (
        read_json(folder / f"{stem}_config.json"),
        rule_state_dict(read_key_shapes(folder / f"{stem}_keys.json.gz"), salt),
    )
