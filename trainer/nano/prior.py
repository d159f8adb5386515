"""The small model's prior: a U-Net and a text encoder trained from nothing.

A few processor hours show a network far fewer images than a text-to-image prior worth steering needs. Restoring is
easier to learn. So the U-Net learns it from the beginning, together with a ControlNet and RCA: most steps are stage 2's
with every weight trained.

Restoring alone would leave nothing that text could ask for. So the other steps show the U-Net text alone, which makes
it a prior of its own. Stage 2 proper then freezes it and goes on from that ControlNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seesr_core.dape.model import DAPE
from seesr_core.formats.base import Base
from seesr_core.method.denoiser import predict_noise
from seesr_core.method.losses import noise_loss

from ..data.order import Stream, seeded
from ..stage2.networks import Networks, build_networks
from ..stage2.recipes import Stage2Config
from ..stage2.task import Stage2Task
from .text import build_text_encoder


@dataclass(kw_only=True, slots=True)
class PriorSizes:
    """Sizes of the small U-Net and text encoder."""

    channels: tuple[int, ...] = (64, 128, 128)
    """Channels per level; heads are 64 wide as in SD-2."""
    attention: tuple[bool, ...] = (False, True, True)
    """Which levels have text transformers (and so RCA); at full resolution they cost most and matter least."""
    layers: int = 1
    """Residual blocks per level."""
    text_width: int = 192
    """Width of the text states."""
    text_layers: int = 2
    """Layers of the text encoder that are read."""


@dataclass(kw_only=True, slots=True)
class PriorConfig:
    """How the prior is trained."""

    stage2: Stage2Config
    """The joint steps' settings."""
    sizes: PriorSizes = field(default_factory=PriorSizes)
    """Sizes of the prior's networks."""
    alone: float = 0.15
    """Share of the steps that show the U-Net text alone."""
    without_soft_prompt: float = 0.25
    """Share of the other steps that go without the soft prompt: it says more than the words, and where it is always
    there the words are never learnt."""
    human_words: bool = True
    """Whether the photos' own words follow the tagger's in the prompts. Stage 2 proper has the tagger's alone."""


def unet_config(sizes: PriorSizes) -> dict[str, Any]:
    """diffusers config of the small U-Net."""
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in sizes.attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(sizes.attention)]
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(sizes.channels),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": sizes.layers,
        "attention_head_dim": [channels // 64 for channels in sizes.channels],
        "cross_attention_dim": sizes.text_width,
        "use_linear_projection": True,
    }


def build_prior(config: PriorConfig, vae: nn.Module, tokenizer_files: Any, dape: DAPE) -> Networks:
    """Fresh networks, all of U-Net, ControlNet, RCA and text encoder trained."""
    seed = config.stage2.loop.seed
    text_encoder, tokenizer = build_text_encoder(
        tokenizer_files, width=config.sizes.text_width, layers=config.sizes.text_layers, seed=seed
    )
    base = Base(
        unet_config=unet_config(config.sizes),
        unet_state={},
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        scheduler={},
    )
    return trainable(build_networks(base, dape, config.stage2))


def trainable(networks: Networks) -> Networks:
    """Let the U-Net and the text encoder learn, too."""
    networks.unet.requires_grad_(True)
    networks.text_encoder.requires_grad_(True)
    return networks


class PriorTask(Stage2Task):
    """Stage 2's task with the U-Net and the text encoder trained as well."""

    def __init__(self, config: PriorConfig, networks: Networks, *data: Any, pool_folder: Path | None = None) -> None:
        super().__init__(config.stage2, networks, *data, pool_folder=pool_folder)
        self.prior = config
        self.trained = nn.ModuleDict(
            {"unet": networks.unet, "controlnet": networks.controlnet, "text_encoder": networks.text_encoder}
        )

    def identity(self) -> dict[str, Any]:
        """What must stay the same when the part is resumed."""
        own = {name: getattr(self.prior, name) for name in ("alone", "without_soft_prompt", "human_words")}
        return {**super().identity(), **own}

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Eq. 2, with or without the soft prompt, or the plain denoising loss on text alone."""
        batch = self.batch(step)
        text = self.networks.encode_text(batch.prompts)
        alone, without = torch.rand(2, generator=seeded(self.config.loop.seed, Stream.NANO_PRIOR, step)).tolist()
        if alone < self.prior.alone:
            pred = predict_noise(self.networks.unet, None, batch.noisy(), batch.timesteps, text)
            return noise_loss(pred, batch.noise), {}
        if without < self.prior.without_soft_prompt:
            batch.soft_prompt = None
        loss = noise_loss(self.predict(batch, text), batch.noise)
        return loss, {"loss_joint": loss.item()}
