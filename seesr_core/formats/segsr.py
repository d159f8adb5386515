"""SegSR's trained part: `segsr*.safetensors`, with its classes and their colours inside.

`segdm.` and `bridge.` are the networks; `control.` are changes of SeeSR's ControlNet by diffusers' names: `….diff` is
added to a weight, of `….lora_A` and `….lora_B` the product B·A.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from ..segsr.model import ClassList, Colour, Names, SegSR, SegSRConfig
from . import metadata, sources
from .border import one_sentence
from .detect import Kind, require
from .tensorfile import load_tensors

CONTROL, DIFF, LORA_A, LORA_B = "control.", ".diff", ".lora_A", ".lora_B"
ABOUT = ("recipe", "step", "seesr")
"""Text entries of the metadata that say where a file is from."""


def write_segsr(path: str | os.PathLike[str], segsr: SegSR, *, dtype: torch.dtype = torch.float16) -> None:
    """Write `segsr*.safetensors`; `segsr.control` goes into it as it is.

    Raises:
        SettingsError: weights that are not finite in `dtype`, or another suffix.
        ResourceError: the disk is full or cannot be written to.
    """
    tensors = {**segsr.state_dict(), **{f"{CONTROL}{key}": tensor for key, tensor in segsr.control.items()}}
    metadata.save_safetensors(path, metadata.cast(tensors, dtype), segsr_metadata(segsr))


def segsr_metadata(segsr: SegSR) -> dict[str, str]:
    """The metadata of a `segsr*.safetensors`."""
    fields: dict[str, Any] = {
        "config": asdict(segsr.config),
        "classes": segsr.classes.names,
        "palette": segsr.classes.palette,
        "defaults": segsr.defaults,
        **segsr.about,
    }
    return metadata.encode(metadata.SEGSR, fields)


def read_segsr(path: str | os.PathLike[str]) -> SegSR:
    """Read what `write_segsr` wrote, in float32 and evaluation mode.

    Raises:
        WeightsError: another kind of file, a damaged or newer one, or weights that contradict its own configuration.
    """
    header = require(path, sources.SEGSR, Kind.SEGSR).header
    metadata.check_version(path, header.metadata, metadata.SEGSR)
    with one_sentence(path, sources.SEGSR):
        config = metadata.field(path, header.metadata, "config", SegSRConfig)
    names = metadata.field(path, header.metadata, "classes", Names)
    palette = metadata.field(path, header.metadata, "palette", list[Colour])
    defaults = metadata.field(path, header.metadata, "defaults", dict[str, str | bool | int | float], {})
    about = {name: header.metadata[name] for name in ABOUT if name in header.metadata}
    tensors = metadata.as_dtype(load_tensors(path), torch.float32)
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(CONTROL)}
    control = {key.removeprefix(CONTROL): tensor for key, tensor in tensors.items() if key not in own}
    with one_sentence(path, sources.SEGSR):
        classes = ClassList(names=names, palette=palette)
        with torch.device("meta"):
            segsr = SegSR(config, classes, control=control, defaults=defaults, about=about)
        segsr.load_state_dict(own, assign=True)
        control_deltas(segsr)
    return segsr.eval().requires_grad_(False)


def control_deltas(segsr: SegSR) -> dict[str, Tensor]:
    """What is added to each of the ControlNet's weights, by diffusers' names, float32.

    Raises:
        WeightsError: half of a low-rank change, or an entry that is none.
    """
    control, deltas = segsr.control, {}
    for key, tensor in control.items():
        name, kind = key[: key.rindex(".")], key[key.rindex(".") :]
        if kind == DIFF:
            deltas[name] = tensor.float()
        elif kind == LORA_A and name + LORA_B in control:
            deltas[name] = control[name + LORA_B].float() @ tensor.float()
        elif kind != LORA_B or name + LORA_A not in control:
            raise WeightsError(f"The file changes the ControlNet by {key!r}, which is no whole change; it is damaged.")
    return deltas


@torch.no_grad()
def change_control(controlnet: Any, segsr: SegSR) -> None:
    """Add to a diffusers ControlNet, in place, what it learnt beside the bridge.

    Raises:
        WeightsError: a weight that it does not have, or of another size.
    """
    parameters = dict(controlnet.named_parameters())
    for name, delta in control_deltas(segsr).items():
        if name not in parameters or parameters[name].shape != delta.shape:
            raise WeightsError(
                f"The SegSR file changes the ControlNet's weight {name}, which this ControlNet does not have in that "
                "size; choose the SeeSR model that it was trained with."
            )
        parameters[name] += delta.to(parameters[name])
