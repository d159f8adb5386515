"""The trained weights of SegSR as the file that the nodes load."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from seesr_core.formats.segsr import DIFF, LORA_A, LORA_B, write_segsr
from seesr_core.segsr.model import SegSR

from ..engine.processes import is_main_process
from ..engine.sharding import whole

log = logging.getLogger(__name__)

_CONTROL, _SEGSR = "controlnet.", "segsr."
_ADAPTERS = {".lora_A.default.weight": LORA_A, ".lora_B.default.weight": LORA_B}


def export(
    segsr: SegSR,
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    path: Path,
    *,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the trained weights as `segsr*.safetensors`; every process has to ask, and the main one writes.

    Args:
        segsr: the networks; get the weights.
        weights: what was trained, by the task's names.
        before: the ControlNet's trained weights as they were, by its own names.
        path: of the file.
        dtype: of its weights.
    """
    trained = {name: whole(tensor) for name, tensor in weights.items()}
    own = {name.removeprefix(_SEGSR): tensor for name, tensor in trained.items() if name.startswith(_SEGSR)}
    segsr.load_state_dict(own)
    segsr.control = control_changes(trained, before)
    if is_main_process():
        write_segsr(path, segsr, dtype=dtype)
        log.info("wrote %s", path)


def control_changes(trained: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the ControlNet learnt, under the names of the file."""
    changes = {}
    for name, tensor in trained.items():
        key = name.removeprefix(_CONTROL)
        adapter = next((ending for ending in _ADAPTERS if key.endswith(ending)), None)
        if adapter is not None:
            changes[f"{key.removesuffix(adapter)}.weight{_ADAPTERS[adapter]}"] = tensor
        elif name.startswith(_CONTROL):
            changes[key + DIFF] = tensor - before[key].to(tensor)
    return changes
