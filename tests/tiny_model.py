"""A whole model small enough to run in the fast tests: random weights, every part, pictures of 64 pixels."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seesr_core.dape import DAPE, Vocabulary
from seesr_core.formats.base import build_tokenizer
from seesr_core.formats.control import ControlParts, write_control
from seesr_core.formats.ram import write_dape
from seesr_core.formats.sd import BaseParts, write_base
from seesr_core.models import Models

from .checkpoint_files import randomize, tokenizer_files, unet_config
from .dape_nets import CONFIG, tiny_dape

DEFAULTS: dict[str, Any] = {"steps": 2, "start_timestep": 600, "cfg": 1.5, "min_size": 64}
SCHEDULER = {"beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
TAGS = (
    "a",
    "b",
    "ab",
    "ü",
    "a b",
    "b a",
    "a ü",
    "ü a",
    "b ü",
    "ü b",
    "ab ü",
)  # words that the tokenizer can tell apart


@functools.cache
def networks() -> dict[str, Any]:
    """U-Net, ControlNet, autoencoder and text encoder, float32; shared by all tests, which leave them as they are."""
    from diffusers import AutoencoderTiny
    from transformers import CLIPTextConfig, CLIPTextModel

    from seesr_core.method.controlnet import controlnet_from_unet
    from seesr_core.method.unet import build_unet

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokens: dict[str, Any] = {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    unet = randomize(build_unet(unet_config([False, True], widths=[32, 64]), context_dim=CONFIG.token_width), 1)
    return {
        "unet": unet,
        "controlnet": randomize(controlnet_from_unet(unet, hint_channels=(8, 8, 8, 8)), 2),
        "vae": randomize(AutoencoderTiny(), 3),
        "text_encoder": randomize(CLIPTextModel(CLIPTextConfig(max_position_embeddings=16, **sizes, **tokens)), 4),
    }


@functools.cache
def tagger() -> tuple[DAPE, Vocabulary]:
    """A tagger with low thresholds, so that photos have tags."""
    return tiny_dape(), Vocabulary(tags=TAGS, tags_zh=TAGS, thresholds=torch.full((len(TAGS),), 0.45))


def tiny_models(**changes: Any) -> Models:
    """The model in memory, on the CPU in float32."""
    dape, vocabulary = tagger()
    parts = {**networks(), "tokenizer": build_tokenizer(tokenizer_files()), "dape": dape, "vocabulary": vocabulary}
    return Models(**{**parts, "name": "tiny", "defaults": dict(DEFAULTS), **changes})


def write_tiny_model(folder: Path) -> Path:
    """The model as files of this project."""
    parts = networks()
    folder.mkdir(parents=True, exist_ok=True)
    base = {name: parts[name] for name in ("unet", "vae", "text_encoder")}
    write_base(
        folder / "tiny.safetensors",
        BaseParts.from_modules(**base, tokenizer=tokenizer_files(), scheduler=SCHEDULER),
        dtype=torch.float32,
    )
    control = ControlParts.from_modules(parts["unet"], parts["controlnet"], base="tiny", defaults=DEFAULTS)
    write_control(folder / "seesr.safetensors", control, dtype=torch.float32)
    write_dape(folder / "dape.safetensors", *tagger(), dtype=torch.float32)
    return folder


def write_results(folder: Path, names: str, width: int, height: int, *, lr_seed: int = 0) -> None:
    """HR, results that equal it, and LR of a quarter of its sides, from other seeds if `lr_seed` says so."""
    for kind in ("hr", "sr", "lr"):
        (folder / kind).mkdir()
    for seed, name in enumerate(names):
        for kind in ("hr", "sr"):
            photo(width, height, seed).save(folder / kind / f"{name}.png")
        photo(width // 4, height // 4, seed + lr_seed).save(folder / "lr" / f"{name}.png")


def photo(width: int = 16, height: int = 16, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth random picture."""
    draws = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(draws).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
