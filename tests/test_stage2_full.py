"""Stage 2 around networks of SD-2's size: what is trained, the memory that a pass takes, and one optimizer step.

Shapes alone (fake tensors) tell parameters and memory; the optimizer step computes with real, random weights and needs
about 18 GiB. The same functions run on small networks in the fast tests.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch._subclasses.fake_tensor import FakeTensorMode

from seesr_core.dape import DAPE
from seesr_core.dape.head import HeadConfig
from seesr_core.formats.base import Base
from seesr_core.method.controlnet import controlnet_from_unet
from seesr_core.method.rca import rca_parameters
from seesr_core.method.unet import build_unet
from seesr_core.runtime.memory import available_memory
from trainer.capacity.dry_run import GIB, cost_of_pass
from trainer.data.order import seeded
from trainer.nano.tagger import tagger_config
from trainer.nano.text import build_text_encoder, train_tokenizer
from trainer.stage2.networks import Networks, build_networks
from trainer.stage2.task import Stage2Task

from .golden import golden_dir
from .small_nets import SOFT_DIM, unet_config
from .stage2_nets import config, write_photos

log = logging.getLogger(__name__)

RCA_PARAMETERS, CONTROLNET_PARAMETERS = 260_849_600, 489_031_440


def full_config() -> dict[str, Any]:
    """diffusers config of the published U-Net."""
    path = golden_dir() / "unet_controlnet" / "full_unet_config.json"
    return json.loads(path.read_text("utf-8"))


def shapes_only(
    unet: dict[str, Any], soft_dim: int, *, checkpointing: bool, hint_channels: tuple[int, ...]
) -> Networks:
    """Networks without contents; call it and use them under `FakeTensorMode`."""
    nets: Any = Networks(
        unet=build_unet(unet, context_dim=soft_dim).requires_grad_(False),
        controlnet=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        dape=None,  # type: ignore[arg-type]
    )
    nets.controlnet = controlnet_from_unet(nets.unet, hint_channels=hint_channels)
    nets.controlnet.requires_grad_(True)
    for parameter in rca_parameters(nets.unet).values():
        parameter.requires_grad_(True)
    if checkpointing:
        nets.unet.train().enable_gradient_checkpointing()
        nets.controlnet.train().enable_gradient_checkpointing()
    return nets


def cost(
    unet: dict[str, Any],
    soft_dim: int,
    side: int,
    *,
    bf16: bool,
    checkpointing: bool,
    hint_channels: tuple[int, ...] = (16, 32, 96, 256),
) -> tuple[int, int, int]:
    """Trained parameters, and bytes and arithmetic of a pass of one image with `side`² latents."""
    with FakeTensorMode():
        nets = shapes_only(unet, soft_dim, checkpointing=checkpointing, hint_channels=hint_channels)
        t, soft_prompt = torch.zeros(1, dtype=torch.long), torch.zeros(1, 145, soft_dim)
        image = torch.zeros(1, 3, 8 * side, 8 * side)
        text, x = torch.zeros(1, 77, unet["cross_attention_dim"]), torch.zeros(1, 4, side, side)
        parameters = [*nets.unet.parameters(), *nets.controlnet.parameters()]

        def loss() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return nets.predict(x, t, text, image=image, soft_prompt=soft_prompt).float().square().mean()

        peak, flops = cost_of_pass(loss, parameters)
    return sum(p.numel() for p in parameters if p.requires_grad), peak, flops


@pytest.mark.slow
def test_recomputing_activations_costs_arithmetic() -> None:
    plain, spared = (cost(unet_config(), SOFT_DIM, 16, bf16=False, checkpointing=value) for value in (False, True))
    assert plain[0] == spared[0]
    assert min(plain[1], spared[1]) > 0
    assert spared[2] > plain[2] > 0


@pytest.mark.slow
def test_at_full_size_rca_and_the_controlnet_are_trained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for bf16 in (False, True):
            for checkpointing in (False, True):
                trained, peak, flops = cost(full_config(), 512, 64, bf16=bf16, checkpointing=checkpointing)
                assert trained == RCA_PARAMETERS + CONTROLNET_PARAMETERS
                figures = (bf16, checkpointing, peak / GIB, flops / 1e12)
                log.info("bf16 %s, checkpointing %s: %.2f GiB and %.2f TFLOP a 512² image", *figures)


def one_step(unet: dict[str, Any], text_width: int, soft_width: int, folder: Path) -> dict[str, float]:
    """One whole optimizer step of stage 2 on a 64² crop with gradient checkpointing; its figures."""
    settings = replace(
        config(batch_size=1), gradient_checkpointing=True, null_text=0.0, hint_channels=(16, 32, 96, 256)
    )
    text_encoder, tokenizer = build_text_encoder(
        train_tokenizer(["a", "b"], vocab_size=600), width=text_width, layers=1
    )
    sizes = tagger_config(2, 64)
    head = HeadConfig(hidden=64, heads=2, layers=2, intermediate=64, encoder_width=soft_width, dropout=0.0)
    dape = DAPE(replace(sizes, head=head))
    dape.initialize(seeded(1))
    base = Base(
        unet_config=unet,
        unet_state={},
        vae=AutoencoderTiny(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler={},
    )
    task = _task(build_networks(base, dape.eval(), settings), settings, folder)
    trained = [p for p in task.trained.parameters() if p.requires_grad]
    before = [p.detach().flatten()[0].item() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    start = time.monotonic()
    loss, _ = task.loss(0)
    loss.backward()
    optimizer.step()
    moved = sum(p.detach().flatten()[0].item() != old for p, old in zip(trained, before, strict=True))
    return {
        "loss": loss.item(),
        "trained": sum(p.numel() for p in trained),
        "moved": moved / len(trained),
        "seconds": time.monotonic() - start,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def _task(networks: Networks, settings: Any, folder: Path) -> Stage2Task:
    from trainer.data.crops import Crops
    from trainer.data.photos import read_photos
    from trainer.stage2.batches import tag_prompts

    networks.unet.train()
    networks.controlnet.train()
    crops = Crops(read_photos(write_photos(folder)), size=settings.crop, seed=0)
    return Stage2Task(settings, networks, crops, tag_prompts(crops.photos))


def test_one_step_moves_what_is_trained(tmp_path: Path) -> None:
    figures = one_step(unet_config(cross_attention_dim=64), 64, 64, tmp_path)
    assert math.isfinite(figures["loss"])
    # Behind convolutions that start at zero nothing moves in the first step.
    assert 0 < figures["moved"] < 1


@pytest.mark.slow
def test_one_step_at_full_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if (free := available_memory() or 0) < 18 * GIB:
        pytest.skip(f"needs 18 GiB of memory, {free / GIB:.0f} are free")
    with caplog.at_level(logging.INFO):
        figures = one_step(full_config(), 1024, 512, tmp_path)
        log.info("one step at full size: %s", figures)
    assert figures["trained"] == RCA_PARAMETERS + CONTROLNET_PARAMETERS
    assert math.isfinite(figures["loss"])
