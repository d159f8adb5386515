"""Activations that are computed again instead of kept: less memory, the same loss and gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from seesr_core.formats.base import Base
from seesr_core.formats.control import ControlParts
from seesr_core.method.losses import noise_loss
from trainer.capacity.live_memory import LiveBytes
from trainer.data.crops import Crops
from trainer.data.photos import read_photos
from trainer.stage2.batches import tag_prompts
from trainer.stage2.networks import build_networks
from trainer.stage2.task import Stage2Task

from .stage2_nets import config, small_networks, write_photos


def task_of(photos: Path, *, checkpointing: bool) -> Stage2Task:
    """Fresh networks as a run would build them."""
    nets = small_networks()
    base = Base(
        unet_config=ControlParts.from_modules(nets.unet, nets.controlnet).unet_config,
        unet_state={},
        vae=nets.vae,
        text_encoder=nets.text_encoder,
        tokenizer=nets.tokenizer,
        scheduler={},
    )
    settings = replace(config(batch_size=8), gradient_checkpointing=checkpointing)
    crops = Crops(read_photos(photos), size=settings.crop, min_scale=settings.min_scale, seed=settings.loop.seed)
    return Stage2Task(settings, build_networks(base, nets.dape, settings), crops, tag_prompts(crops.photos))


def trained_step(task: Stage2Task) -> tuple[float, dict[str, torch.Tensor], int, int]:
    """Loss, gradients, bytes kept for the backward pass, and the most that lived at once."""
    named = {name: p for name, p in task.trained.named_parameters() if p.requires_grad}
    for number, parameter in enumerate(named.values()):  # zero convolutions would let no gradient through
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        parameter.grad = torch.zeros_like(parameter)
    batch = task.batch(0)
    text = task.text_states(batch.prompts)
    with LiveBytes(task.trained.parameters()) as memory:
        loss = noise_loss(task.predict(batch, text), batch.noise)
        kept = memory.now
        loss.backward()
    return loss.item(), {name: p.grad for name, p in named.items() if p.grad is not None}, kept, memory.peak


def test_recomputed_activations_take_less_memory_and_give_the_same_gradients(tmp_path: Path) -> None:
    photos = write_photos(tmp_path)
    plain, spared = (trained_step(task_of(photos, checkpointing=value)) for value in (False, True))
    assert spared[0] == plain[0]
    assert spared[1].keys() == plain[1].keys()
    assert max(float(gradient.abs().max()) for gradient in plain[1].values()) > 0
    for name, gradient in plain[1].items():
        torch.testing.assert_close(spared[1][name], gradient, rtol=1e-5, atol=1e-8)
    assert spared[2] < 0.5 * plain[2], (spared[2:], plain[2:])
    assert spared[3] < 0.8 * plain[3], (spared[2:], plain[2:])
