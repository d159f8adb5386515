"""Stage 2 in small: the networks of the tiny model, photos of noise, and a task around them."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from seesr_core.method.rca import rca_parameters
from trainer.data.crops import Crops
from trainer.data.photos import read_photos
from trainer.engine.command import get_recipe
from trainer.stage2.batches import tag_prompts
from trainer.stage2.networks import Networks
from trainer.stage2.recipes import STAGE2_RECIPES, Stage2Config
from trainer.stage2.task import Stage2Task

from .tiny_model import networks, tagger, tiny_models


def write_photos(folder: Path, count: int = 6) -> Path:
    """Photos of noise with tags; returns their list."""
    lines = []
    for index in range(count):
        pixels = torch.randint(0, 256, (80, 72, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        lines.append(json.dumps({"file": f"{index}.png", "tags": ["a", "b"][: 1 + index % 2]}))
    (folder / "photos.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "photos.jsonl"


def config(**loop: Any) -> Stage2Config:
    """The debug recipe, every image degraded by itself."""
    recipe = get_recipe(STAGE2_RECIPES, "debug")
    return replace(recipe, loop=replace(recipe.loop, **loop), degradation_group=1)


def small_networks() -> Networks:
    """Copies of the tiny model's networks; ControlNet and RCA require gradients."""
    parts = deepcopy(networks())
    nets = Networks(**parts, tokenizer=tiny_models().tokenizer, dape=deepcopy(tagger()[0]))
    for frozen in (nets.unet, nets.vae, nets.text_encoder, nets.dape):
        frozen.requires_grad_(False)
    for parameter in rca_parameters(nets.unet).values():
        parameter.requires_grad_(True)
    return nets


def small_task(photos: Path, settings: Stage2Config | None = None, **more: Any) -> Stage2Task:
    """A task on the photos of a list."""
    settings = settings or config()
    crops = Crops(read_photos(photos), size=settings.crop, min_scale=settings.min_scale, seed=settings.loop.seed)
    return Stage2Task(settings, small_networks(), crops, tag_prompts(crops.photos), **more)
