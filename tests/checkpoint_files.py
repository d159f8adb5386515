"""Small weights files and networks for the tests of `seesr_core.formats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from seesr_core.formats.sd import TokenizerFiles

SD2_UNET: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
"""Stable Diffusion 2's U-Net."""


def unet_config(attention: Sequence[bool], *, layers: int = 1, widths: Sequence[int] | None = None) -> dict[str, Any]:
    """A small U-Net with text attention at the given levels, from the outermost in."""
    widths = widths or [64] * len(attention)
    return {
        "block_out_channels": list(widths),
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        "cross_attention_dim": 32,
        "attention_head_dim": [max(1, width // 64) for width in widths],
        "use_linear_projection": True,
        "sample_size": 16,
    }


def write_zeros(path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of half-precision zeros."""
    tensors = {key: torch.zeros(tuple(shape), dtype=torch.float16) for key, shape in shapes.items()}
    save_file(tensors, path, dict(metadata or {}))
    return path


def randomize(module: Any, seed: int = 0) -> Any:
    """Give every parameter a value of its own, also those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers of a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokenizer_files() -> TokenizerFiles:
    """A byte-pair tokenizer that knows three letters and one merge."""
    tokens = ["<|startoftext|>", "<|endoftext|>", "a", "b", "ü", "a</w>", "b</w>", "ü</w>", "ab</w>"]
    return TokenizerFiles(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=["a b</w>"],
        config={"model_max_length": 16, "pad_token": "<|endoftext|>"},
    )
