"""What a run will take on this machine, in a line, before it begins."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import comfy.model_management
import torch

from ...seesr_core.runtime import cost
from ...seesr_core.settings import UpscaleSettings
from .seesr_model import SeeSRModel


def forecast(seesr_model: SeeSRModel, photo: tuple[int, int], settings: UpscaleSettings) -> str:
    """Steps, tiles, memory and rough time for a photo of (width, height) pixels, and whether it fits."""
    place = comfy.model_management.get_torch_device()
    device = replace(_device(place), memory=int(comfy.model_management.get_free_memory(place)))
    shape = cost.FULL if seesr_model.model_channels >= cost.FULL.channels else cost.NANO
    found = cost.predict(shape, photo, settings, device)
    if found.fits:
        return f"{found.text()}: fits."
    return f"{found.text()}: too much at once; smaller tiles, or start ComfyUI with --lowvram."


@lru_cache(maxsize=4)
def _device(place: torch.device) -> cost.Device:
    dtype = comfy.model_management.unet_dtype(place) or torch.float32
    return cost.this_device(place, dtype)
