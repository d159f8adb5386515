"""Small random networks of the whole method, for tests that need shapes and behaviour but no training."""

from __future__ import annotations

from typing import Any

import torch

SOFT_DIM, TEXT_DIM = 24, 32


def unet_config(**changes: Any) -> dict[str, Any]:
    """A two-level U-Net, text transformers on its second level only."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": [2, 4],
        "cross_attention_dim": TEXT_DIM,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    return {**config, **changes}


def seeded_networks(seed: int = 0) -> tuple[Any, Any]:
    """U-Net and ControlNet with RCA, random from `seed`; the ControlNet's output convolutions are not zero."""
    from seesr_core.method.controlnet import controlnet_from_unet
    from seesr_core.method.unet import build_unet

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = build_unet(unet_config(), context_dim=SOFT_DIM)
        control = controlnet_from_unet(unet, hint_channels=(4, 4, 8, 8)).eval()
        for parameter in control.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.1)
    return unet, control


def inputs(batch: int = 2, size: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    """Latents, text, soft prompt and image that fit `seeded_networks`."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 4, size, size, generator=g),
        "text": torch.randn(batch, 77, TEXT_DIM, generator=g),
        "soft": torch.randn(batch, 5, SOFT_DIM, generator=g),
        "image": torch.rand(batch, 3, 8 * size, 8 * size, generator=g),
    }
