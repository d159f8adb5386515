"""Small files in the published layouts, for the tests of `seesr_core.install`: no network is ever built for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from seesr_core.dape import DAPE
from seesr_core.formats.ldm import unet_to_ldm
from seesr_core.formats.sources import TAG_LISTS

from .checkpoint_files import normal
from .dape_nets import CONFIG, tiny_dape

SOFT = CONFIG.token_width
UNET_CONFIG: dict[str, Any] = {
    "block_out_channels": [320],
    "cross_attention_dim": 1024,
    "in_channels": 4,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "use_image_cross_attention": True,
}
NORM = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
LDM_NORM = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
TAGS = [f"tag {i}" for i in range(CONFIG.num_tags)]

_TEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_SHAPES: dict[str, tuple[int, ...]] = {
    "conv_in.weight": (320, 4, 3, 3),
    "conv_in.bias": (320,),
    "time_embedding.linear_1.weight": (64, 320),
    "down_blocks.0.resnets.0.conv1.weight": (32, 16, 3, 3),
    _TEXT: (16, 1024),
    "mid_block.resnets.1.norm2.weight": (24,),
}
_RCA: dict[str, tuple[int, ...]] = {
    _TEXT.replace("attentions", "image_attentions").replace("1024", ""): (16, SOFT),
    "mid_block.image_attentions.0.norm.weight": (24,),
}
_HINT: dict[str, tuple[int, ...]] = {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}


def filled(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Normal numbers, other ones for every key."""
    return {key: normal(*shape, seed=seed + i) for i, (key, shape) in enumerate(shapes.items())}


def unet_state(seed: int = 0) -> dict[str, Tensor]:
    """A few of the weights of a Stable Diffusion 2 U-Net."""
    return filled(_SHAPES, seed)


def write_seesr(folder: Path, *, suffix: str = ".safetensors", unet: Mapping[str, Tensor] | None = None) -> Path:
    """The published SeeSR folder around a U-Net."""
    states = {
        "unet": {**(unet or unet_state()), **filled(_RCA, 50)},
        "controlnet": filled({**_SHAPES, **_RCA, **_HINT}, 100),
    }
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(UNET_CONFIG))
        save(folder / name / f"diffusion_pytorch_model{suffix}", state)
    return folder


def save(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A weights file, its container chosen by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(dict(state), path, metadata)
    else:
        torch.save(dict(state), path)
    return path


def write_base_folder(folder: Path, unet: Mapping[str, Tensor] | None = None, **scheduler: str) -> Path:
    """As much of a diffusers folder as tells a base model."""
    save(folder / "unet" / "diffusion_pytorch_model.safetensors", unet or unet_state())
    (folder / "vae").mkdir()
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon", **scheduler}))
    return folder


def write_base_file(path: Path, metadata: dict[str, str] | None = None, *, norm: float | None = None) -> Path:
    """A single-file Stable Diffusion 2; `norm` is the spread of the bias by which ComfyUI tells v-prediction."""
    state = {f"model.diffusion_model.{key}": t for key, t in unet_to_ldm(unet_state(), UNET_CONFIG).items()}
    if norm is not None:
        state[LDM_NORM] = torch.tensor([norm, -norm])
    return save(path, state, metadata)


def write_ram(folder: Path, *, name: str = "ram_swin_large_14m.pth") -> DAPE:
    """RAM's pickle with its ballast, the adapter, and the tag lists; returns plain RAM."""
    folder.mkdir(parents=True, exist_ok=True)
    dape = tiny_dape()
    state = {key.replace("tagging_head", "vision_multi"): t for key, t in dape.state_dict().items()}
    ballast = {
        "tag_encoder.encoder.layer.0.output.dense.weight": torch.zeros(300, 300),
        "text_decoder.cls.predictions.bias": torch.zeros(30_000),
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
    }
    torch.save({"model": {**state, **ballast}, "epoch": 3}, folder / name)
    torch.save(adapter(), folder / "DAPE.pth")
    lines = (TAGS, [f"{0.4 + 0.01 * i:.2f}" for i in range(len(TAGS))], [f"标签{i}" for i in range(len(TAGS))])
    for list_name, entries in zip(TAG_LISTS, lines, strict=True):
        (folder / list_name).write_text("\n".join(entries), encoding="utf-8")
    return dape


def adapter() -> dict[str, Tensor]:
    """In the layout of DAPE.pth, for one fused layer."""
    layer = "visual_encoder.layers.0.blocks.1.attn.qkv"
    return {f"{layer}.lora_A": normal(4, 16, seed=1), f"{layer}.lora_B": normal(32, 2, seed=2)}


def files_below(folder: Path) -> list[str]:
    """Everything in a folder and its folders, by relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
