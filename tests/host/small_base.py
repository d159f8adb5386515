"""A base file smaller than the shipped one, its weights drawn from their names, so that any program can make it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .locate import plugin

UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [1, 1],
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "norm_num_groups": 32,
}
TOKENS = ["!", "a", "b", "c", "!</w>", "a</w>", "b</w>", "c</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
TEXT: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 9,
    "eos_token_id": 10,
    "pad_token_id": 0,
}
VAE: dict[str, Any] = {
    "scaling_factor": 1.0,
    "encoder_block_out_channels": [64] * 4,
    "decoder_block_out_channels": [64] * 4,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_channels": 4,
}

PROMPT, TIMESTEP = "ab c! a", 251
RECORDED = {
    "text": [0.696208, 0.071883, 0.812067, -0.926998],
    "eps": [-0.764197, -0.603737, -0.156998, 1.02807],
    "latent": [-0.430178, 0.075681, 0.886624, 0.10854],
    "picture": [0.369726, -0.180655, 0.519913],
}
"""Some of what the core's networks (diffusers 0.42, transformers 5.23, float32) make of `PROMPT` at `TIMESTEP` and of
`small_inputs`; `tests/test_small_base.py` computes them anew."""


def small_inputs() -> tuple[Tensor, Tensor]:
    """A latent (1, 4, 8, 16) and a picture (1, 3, 32, 64)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 4, 8, 16, generator=generator), torch.rand(1, 3, 32, 64, generator=generator)


def drawn(key: str, shape: torch.Size) -> Tensor:
    """The weight called `key` in a single-file checkpoint: normal, about preserving variance, in half precision."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    scale = values[0].numel() ** -0.5 if len(shape) > 1 else 0.1
    offset = 1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
    return (values * scale + offset).half()


def tokenizer_files(sd: Any) -> Any:
    """The small base's tokenizer; `sd` is the module `seesr_core.formats.sd` that will write it."""
    special = {"bos_token": TOKENS[9], "eos_token": TOKENS[10], "unk_token": TOKENS[10], "pad_token": TOKENS[0]}
    vocab = {token: number for number, token in enumerate(TOKENS)}
    return sd.TokenizerFiles(vocab=vocab, merges=["a b</w>"], config={**special, "model_max_length": 77})


def write_small_base(path: Path, *, latent_channels: int = 4) -> None:
    """Write the file with the plugin's own writer; names and shapes are those of the host's classes."""
    import comfy.clip_model
    import comfy.ops
    import comfy.taesd.taesd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    sd, ldm = plugin("seesr_core.formats.sd"), plugin("seesr_core.formats.ldm")
    unet_config = {**UNET, "in_channels": latent_channels, "out_channels": latent_channels}
    entries = plugin("nodes.host.keys").host_config(unet_config)
    unet = UNetModel(**entries, out_channels=latent_channels, operations=comfy.ops.manual_cast)
    text = plugin("nodes.host.nano")._TextModel(TEXT, torch.float32, "cpu", comfy.ops.manual_cast)
    text_state = {key: value for key, value in text.state_dict().items() if key.startswith("text_model.")}
    vae = comfy.taesd.taesd.TAESD(latent_channels=latent_channels).state_dict()
    parts = sd.BaseParts(
        unet_config=unet_config,
        unet_state=ldm.unet_from_ldm(draw_all(unet.state_dict()), unet_config),
        vae_config={**VAE, "latent_channels": latent_channels},
        vae_state=ldm.taesd_from_ldm(draw_all({key: value for key, value in vae.items() if "taesd" in key})),
        text_config=TEXT,
        text_state=draw_all(text_state),
        tokenizer=tokenizer_files(sd),
        scheduler={},
    )
    sd.write_base(path, parts)


def draw_all(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with drawn weights."""
    return {key: drawn(key, value.shape) for key, value in state.items()}
