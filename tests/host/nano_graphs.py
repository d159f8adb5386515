"""The shipped workflows as graphs for the server, made small, and files that users would bring."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from . import graph as graphs
from .locate import PLUGIN

WORKFLOWS = PLUGIN / "workflows"
NANO = PLUGIN / "seesr_core" / "nano"
PHOTO = "seesr_test_photo.png"
PHOTO_SIZE = (48, 32)
_TILED = ("SeeSRTiledSampler", "SeeSRTileModel", "SeeSRTilePrompts")
LORA, SECOND_CONTROLNET = "your-lora.safetensors", "canny-sd21-safe.safetensors"
"""The names in `6_lora_and_second_controlnet`."""


def workflow(number: int) -> dict[str, Any]:
    """A shipped workflow by its number."""
    return graphs.load(next(WORKFLOWS.glob(f"{number}_*.json")))


def nodes_of(graph: dict[str, Any], class_type: str) -> list[dict[str, Any]]:
    """Inputs of all nodes of a class; they may be changed."""
    return [graph[name]["inputs"] for name in graphs.nodes_of(graph, class_type)]


def small(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph for the tests' tiny photo: no enlarging to 512 pixels first, and tiles to match."""
    for load in nodes_of(graph, "LoadImage"):
        load["image"] = PHOTO
    for prepare in nodes_of(graph, "SeeSRPrepareImage"):
        prepare["min_size"] = 0
    for tiled in (node for kind in _TILED for node in nodes_of(graph, kind)):
        tiled["tile_size"], tiled["overlap"] = 128, 32
    for cut in nodes_of(graph, "ImageScale"):
        cut["width"] = cut["height"] = min(PHOTO_SIZE)
    for decode in nodes_of(graph, "VAEDecodeTiled"):
        decode["tile_size"], decode["overlap"] = 128, 32
    return graph


def small_saved(loaded: dict[str, Any]) -> dict[str, Any]:
    """The same of a workflow as the frontend saves it: for the tests' tiny photo, in tiles to match."""
    values: dict[tuple[str, str | None], dict[int, Any]] = {
        ("LoadImage", None): {0: PHOTO},
        ("SeeSRPrepareImage", None): {1: 0},
        ("ImageScale", None): {1: min(PHOTO_SIZE), 2: min(PHOTO_SIZE)},
        ("PrimitiveInt", "Tile size"): {0: 256},
        ("PrimitiveInt", "Overlap"): {0: 32},
    }
    for node in loaded["nodes"]:
        for key in ((node["type"], None), (node["type"], node.get("title"))):
            for place, value in values.get(key, {}).items():
                node["widgets_values"][place] = value
    return loaded


def full_graph(object_info: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`2_full_graph_nano`, small, with some widget values changed wherever a node has an input of that name."""
    graph = small(graphs.to_api(workflow(2), object_info))
    for node in graph.values():
        node["inputs"].update({name: value for name, value in changes.items() if name in node["inputs"]})
    return graph


def photo_bytes(size: tuple[int, int] = PHOTO_SIZE, *, mirrored: bool = False) -> bytes:
    """The example photo, reduced, as PNG."""
    photo = Image.open(NANO / "example.jpg").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    (photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else photo).save(out, "PNG")
    return out.getvalue()


def enlarged(size: tuple[int, int]) -> np.ndarray:
    """The tests' photo, plainly enlarged to `size`: (H, W, 3) uint8."""
    photo = Image.open(io.BytesIO(photo_bytes())).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(photo)


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two pictures of one size, −1 … 1."""
    return float(np.corrcoef(a.astype(np.float64).ravel(), b.astype(np.float64).ravel())[0, 1])


def lora_bytes(rank: int = 2, size: float = 0.3) -> bytes:
    """A LoRA for every attention weight of the small model's U-Net, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out, into) in _unet_shapes(".to_q.weight").items():
        key = "diffusion_model." + name.removesuffix(".weight")
        tensors[f"{key}.lora_up.weight"] = size * torch.randn(out, rank, generator=generator)
        tensors[f"{key}.lora_down.weight"] = size * torch.randn(rank, into, generator=generator)
    return save(tensors)


def control_lora_bytes(size: float = 0.05) -> bytes:
    """A second ControlNet for the small model, as a control-LoRA: the U-Net's encoder with a drawn hint and exits."""
    generator = torch.Generator().manual_seed(8)
    tensors = {"lora_controlnet": torch.zeros(1)}
    shapes = _control_shapes()
    for name, shape in shapes.items():
        scale = size if len(shape) == 4 else 0.0
        tensors[name] = scale * torch.randn(*shape, generator=generator)
    return save(tensors)


def _unet_shapes(ending: str) -> dict[str, list[int]]:
    """Names, without the prefix, and shapes of the small model's U-Net weights that end so."""
    prefix = "model.diffusion_model."
    with safe_open(NANO / "checkpoints" / "seesr-nano.safetensors", "pt") as file:
        return {
            key.removeprefix(prefix): file.get_slice(key).get_shape()
            for key in file.keys()  # noqa: SIM118
            if key.startswith(prefix) and key.endswith(ending)
        }


def _control_shapes() -> dict[str, tuple[int, ...]]:
    """Hint encoder and exits of a ControlNet around the small U-Net, in the original (LDM) names."""
    weights = _unet_shapes("weight")
    width = weights["input_blocks.0.0.weight"][0]
    hint = [3, 16, 16, 32, 32, 96, 96, 256, width]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (into, out) in enumerate(pairwise(hint)):
        shapes |= {f"input_hint_block.{2 * i}.weight": (out, into, 3, 3), f"input_hint_block.{2 * i}.bias": (out,)}
    exits = [_out_channels(weights, f"input_blocks.{i}.0.") for i in range(_count(weights, "input_blocks"))]
    for i, out in enumerate(exits):
        shapes |= {f"zero_convs.{i}.0.weight": (out, out, 1, 1), f"zero_convs.{i}.0.bias": (out,)}
    out = exits[-1]
    return shapes | {"middle_block_out.0.weight": (out, out, 1, 1), "middle_block_out.0.bias": (out,)}


def _count(weights: dict[str, list[int]], part: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in weights if name.startswith(part + "."))


def _out_channels(weights: dict[str, list[int]], start: str) -> int:
    """Channels that a block of the U-Net gives: a plain convolution, a downsampling one, or a residual block's last."""
    for end in ("out_layers.3.weight", "op.weight", "weight"):
        if start + end in weights:
            return weights[start + end][0]
    raise AssertionError(f"no weight of {start} in the small model")


def files_for_workflows(put: Any) -> None:
    """Bring the photo, the LoRA and the second ControlNet; `put(folder, name, data)` writes them."""
    put("input", PHOTO, photo_bytes())
    put("models/loras", LORA, lora_bytes())
    put("models/controlnet", SECOND_CONTROLNET, control_lora_bytes())


def waking(loaded: dict[str, Any], mode: int) -> dict[str, Any]:
    """The workflow with its muted or bypassed nodes switched on."""
    for node in loaded["nodes"]:
        if node.get("mode", 0) == mode:
            node["mode"] = 0
    return loaded


def number_of(path: Path) -> int:
    """The number that a shipped workflow's name begins with."""
    return int(path.name.partition("_")[0])


def workflow_paths() -> list[Path]:
    """All shipped workflows, in order."""
    return sorted(WORKFLOWS.glob("*.json"))
