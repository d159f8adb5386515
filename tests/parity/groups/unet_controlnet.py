"""Single calls of U-Net and ControlNet with RCA: keys, residuals, predicted noise; tiny and full size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from seesr_core.method.controlnet import build_controlnet
from seesr_core.method.unet import build_unet

from ..compare import Comparison
from ..weights import read_key_shapes, rule_state_dict

GROUP = "unet_controlnet"
TOLERANCE = 1e-4
KINDS = ("tiny", "full")


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Every run of the kinds of networks that the folder holds."""
    for kind in KINDS if full else KINDS[:1]:
        if (folder / GROUP / f"{kind}_meta.json").exists():
            yield from _kind(folder / GROUP, kind)


@torch.no_grad()
def _kind(folder: Path, kind: str) -> Iterator[Comparison]:
    meta = read_json(folder / f"{kind}_meta.json")
    inputs, expected = (load_file(folder / f"{kind}_{name}.safetensors") for name in ("inputs", "outputs"))
    unet = rule_made(build_unet, read_json(folder / f"{kind}_unet_config.json"), meta["salt_unet"])
    control = rule_made(build_controlnet, read_json(folder / f"{kind}_controlnet_config.json"), meta["salt_controlnet"])
    for name, net in (("unet", unet), ("controlnet", control)):
        shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
        yield Comparison.equal(
            GROUP, kind, f"{name}_keys", shapes, read_key_shapes(folder / f"{kind}_{name}_keys.json.gz")
        )
    for run, settings in meta["runs"].items():
        for quantity, actual in _run(unet, control, inputs, run.split(".")[0], settings).items():
            for form, value in forms(quantity, actual).items():
                if f"{run}.{form}" in expected:
                    yield Comparison.of(GROUP, f"{kind}.{run}", form, value, expected[f"{run}.{form}"], TOLERANCE)


def rule_made(build: Callable[[Mapping[str, Any]], Any], config: Mapping[str, Any], salt: str) -> Any:
    """A network whose weights the rule makes; never initialised at random, which takes long at full size."""
    with torch.device("meta"):
        net = build(config)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    net.load_state_dict(rule_state_dict(shapes, salt), assign=True)
    return net.eval()


def _run(
    unet: Any, control: Any, inputs: Mapping[str, Tensor], size: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The residuals (if ControlNet runs) and ε of one run, which `predict_noise` would not show."""
    x, text = inputs[f"{size}.latent"], inputs[f"{size}.text"]
    t = torch.as_tensor(settings["timestep"])
    found: dict[str, Tensor] = {}
    down = mid = None
    if settings["control"]:
        soft = soft_tokens(inputs, size, settings["soft_controlnet"])
        cond, scale = inputs[f"{size}.cond_u8"].float() / 255, settings["conditioning_scale"]
        down, mid = control(x, t, text, cond, scale, cross_attention_kwargs={"soft_prompt": soft}, return_dict=False)
        found = {f"down{i:02d}": residual for i, residual in enumerate(down)} | {"mid": mid}
    (eps,) = unet(
        x,
        t,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        cross_attention_kwargs={"soft_prompt": soft_tokens(inputs, size, settings["soft_unet"])},
        return_dict=False,
    )
    return {**found, "eps": eps}


def soft_tokens(inputs: Mapping[str, Tensor], size: str, name: str) -> Tensor:
    """The soft prompt that a run calls `name` (A, B, or 0 for zeros)."""
    if name == "0":
        return torch.zeros_like(inputs[f"{size}.softA"])
    return inputs[f"{size}.soft{name}"]


def forms(quantity: str, t: Tensor) -> dict[str, Tensor]:
    """A tensor as the fixtures may hold it: ε whole, residuals as a slice and sometimes in full."""
    if quantity == "eps":
        return {quantity: t}
    channels, height, width = (max(1, side // 8) for side in t.shape[1:])
    return {f"{quantity}_slice": t[:, ::channels, ::height, ::width], f"{quantity}_full": t}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
