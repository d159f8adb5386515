"""The trained weights of stage 2 as the file that the nodes load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seesr_core.formats.control import ControlParts, write_control

from ..engine.adapters import merge_lora
from ..engine.processes import is_main_process
from ..engine.sharding import whole
from .task import Stage2Task

log = logging.getLogger(__name__)


def export(
    task: Stage2Task, weights: Mapping[str, Tensor], path: Path, *, dtype: torch.dtype = torch.float16, **about: Any
) -> None:
    """Write the trained weights as `seesr*.safetensors`; every process has to ask, and the main one writes."""
    if task.config.trained == "lora":
        task.trained.load_state_dict(weights, strict=False)
        merge_lora(task.networks.controlnet)
    parts = ControlParts.from_modules(
        task.networks.unet, task.networks.controlnet, step=task.config.loop.steps, **about
    )
    parts.controlnet_state = _complete(parts.controlnet_state, weights, "controlnet.")
    parts.rca_state = _complete(parts.rca_state, weights, "unet.")
    if is_main_process():
        write_control(path, parts, dtype=dtype)
        log.info("wrote %s", path)


def _complete(state: Mapping[str, Tensor], weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A network's state with the trained weights in it, and the frozen ones gathered from their shards."""
    return {
        name: weights[prefix + name] if prefix + name in weights else whole(tensor) for name, tensor in state.items()
    }
