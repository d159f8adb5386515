"""What this host can do, found out by trying; version numbers are never asked."""

from __future__ import annotations

import functools
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed
from torch import Tensor, nn


class _Bare(SpatialTransformer):
    """A transformer without weights that gives back what it gets."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor, context: Any = None, transformer_options: Any = None) -> Tensor:
        return x


@functools.cache
def patch_reaches_transformers() -> bool:
    """Whether `forward_timestep_embed_patch` is asked about `SpatialTransformer`s.

    The patch point is older than 0.20, but before that the host ran the transformers without asking it.
    """
    reached = []

    def handler(layer: nn.Module, x: Tensor, *_: Any) -> Tensor:
        reached.append(layer)
        return x

    patches = {"forward_timestep_embed_patch": [(_Bare, handler)]}
    forward_timestep_embed([_Bare()], torch.zeros(1), None, None, {"patches": patches, "block": ("middle", 0)})
    return bool(reached)
