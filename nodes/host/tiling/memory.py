"""How many tiles go through the model at once: by free memory, and fewer after it ran out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch

MOST_TILES = 4
"""More bring no speed: one tile at the usual size already fills a device."""
_SAFETY = 2.0
"""Share by which the host's estimate is raised; it leaves ControlNets out."""


def choose_tile_batch(model: Any, tile_shape: Sequence[int], device: torch.device) -> int:
    """Tiles at once that the device has memory for, 1 … 4; 1 on the CPU, where more only cost memory.

    `model` is the host's BaseModel and `tile_shape` the input (B, C, h, w) of one tile, all its conditionings together.
    """
    if device.type == "cpu":
        return 1
    free = comfy.model_management.get_free_memory(device)
    batch, *rest = tile_shape
    tiles = MOST_TILES
    while tiles > 1 and _SAFETY * model.memory_required([tiles * batch, *rest]) > free:
        tiles //= 2
    return tiles


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host takes `error` for a lack of memory; newer ones know more kinds than the one exception."""
    known = getattr(comfy.model_management, "is_oom", None)
    return bool(known(error)) if known else isinstance(error, comfy.model_management.OOM_EXCEPTION)
