"""A SegSR of random weights for the tiny model of the tests, and for any other sizes."""

from __future__ import annotations

from typing import Any

import torch

from seesr_core.segsr.model import ClassList, SegSR, SegSRConfig

from .dape_nets import CONFIG

CLASSES = ClassList(names=["sky", "wall", "grass", "sea", "road"], palette=[(i * 40, 90, 200) for i in range(5)])


def tiny_segsr(*, trained: bool = True, **sizes: Any) -> SegSR:
    """Fresh networks from a fixed seed; `trained` ones have a bridge that says something."""
    fitting = {"latent_channels": 4, "token_width": CONFIG.token_width, "hint_channels": 32}
    config = SegSRConfig(**{**fitting, "widths": (16, 32), "token_channels": 8, "bridge_width": 8, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        segsr = SegSR(config, CLASSES, defaults={"steps": 3, "start_timestep": 700}).eval().requires_grad_(False)
        if trained:
            for encoder in (segsr.bridge.image, segsr.bridge.segmentation):
                encoder.conv_out.weight.normal_(std=0.3)
    return segsr
