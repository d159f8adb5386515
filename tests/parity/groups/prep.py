"""Preparation and finish: every size on the way, and slices of the resized pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from seesr_core.pictures.sizes import Sizes, finish, prepare, prepare_size

from ..compare import Comparison

GROUP = "prep"
SLICE = 8


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Sizes of all cases; pictures of those that have them."""
    meta = json.loads((folder / GROUP / "meta.json").read_text(encoding="utf-8"))
    inputs = load_file(folder / GROUP / "inputs.safetensors")
    outputs = load_file(folder / GROUP / "outputs.safetensors")
    settings = {"scale": float(meta["upscale"]), "min_size": meta["process_size"]}
    for case in meta.get("sizes_only", []):
        yield from size_cases("{}x{}".format(*case["input_wh"]), case, settings)
    for name, case in meta["cases"].items():
        yield from size_cases(name, case, settings)
        picture = Image.fromarray(inputs[f"{name}.u8"].numpy())
        yield from picture_cases(name, picture, outputs, settings)


def size_cases(name: str, case: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Comparison]:
    """Every size that the case states."""
    sizes = prepare_size(*case["input_wh"], **settings)
    for quantity, actual in _sizes(sizes).items():
        if quantity in case:
            yield Comparison.equal(GROUP, name, quantity, list(actual), case[quantity])


def _sizes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    width, height = sizes.prepared
    return {
        "after_min_side_wh": sizes.enlarged,
        "after_upscale_wh": sizes.upscaled,
        "conditioning_wh": sizes.prepared,
        "latent_hw": (height // 8, width // 8),
        "final_output_wh": sizes.final,
    }


def picture_cases(
    name: str, picture: Image.Image, outputs: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> Iterator[Comparison]:
    """The conditioning picture, and the same resized as a result would be."""
    prepared = prepare(picture, **settings)
    final = finish(prepared, prepared, lr_size=picture.size, scale=settings["scale"], color_fix="none")
    for quantity, image in (("cond_slice_u8", prepared), ("final_resize_slice_u8", final)):
        expected = outputs.get(f"{name}.{quantity}")
        if expected is not None:
            yield Comparison.u8(GROUP, name, quantity, _slice(image), expected)


def _slice(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image)[::SLICE, ::SLICE].copy())
