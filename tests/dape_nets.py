"""A tagger small enough for the fast tests, with every kind of part: shifted windows, two stages, two head layers."""

from __future__ import annotations

import torch
from torch import Tensor

from seesr_core.dape import DAPE, DAPEConfig, HeadConfig, LiteConfig, SwinConfig
from seesr_core.dape.efficientnet import LiteEncoder

SWIN = SwinConfig(image_size=48, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window=3, drop_path=0.1)
HEAD = HeadConfig(hidden=24, heads=4, intermediate=40, encoder_width=20)
CONFIG = DAPEConfig(swin=SWIN, head=HEAD, num_tags=11, label_width=12)
LITE = DAPEConfig(swin=None, lite=LiteConfig(image_size=64), head=HEAD, num_tags=11, label_width=12)
"""With EfficientNet-Lite0 at its own width, on a grid of 2 × 2 tokens."""


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_dape(config: DAPEConfig = CONFIG, seed: int = 0) -> DAPE:
    """In evaluation mode; every parameter random, also biases and norms, so that none can be left out unnoticed."""
    dape = DAPE(config)
    _draw(dape, seeded(seed))
    return dape.eval()


def lite_dape(seed: int = 0) -> DAPE:
    """The same around EfficientNet-Lite0, whose weights are such that signals pass."""
    dape, generator = DAPE(LITE), seeded(seed)
    _draw(dape, generator)
    encoder = dape.visual_encoder
    assert isinstance(encoder, LiteEncoder)
    encoder.initialize(generator)
    with torch.no_grad():
        dape.image_proj.weight.mul_(0.1)
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
    return dape.eval()


@torch.no_grad()
def _draw(dape: DAPE, generator: torch.Generator) -> None:
    for name, parameter in dape.named_parameters():
        spread = 0.3 if parameter.ndim > 1 else 0.1
        parameter.normal_(
            1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, spread, generator=generator
        )


def images(count: int = 2, size: int = SWIN.image_size, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=seeded(seed))
