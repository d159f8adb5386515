"""The small model's prior: a U-Net and a text encoder trained from nothing.

A few processor hours show a network far fewer images than a text-to-image prior worth steering needs. Restoring is
easier to learn. So the U-Net learns it from the beginning, together with a ControlNet and RCA: most steps are stage 2's
with every weight trained.

Restoring alone would leave nothing that text could ask for. So the other steps show the U-Net text alone, which makes
it a prior of its own. Stage 2 proper then freezes it and goes on from that ControlNet.
"""

from __future__ import annotations

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
from ..engine.journal import Figures
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


def unet_config(sizes: PriorSizes, *, latent_channels: int) -> dict[str, Any]:
    """diffusers config of the small U-Net."""
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in sizes.attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(sizes.attention)]
    return {
        "sample_size": 64,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": list(sizes.channels),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": sizes.layers,
        "attention_head_dim": [channels // 64 for channels in sizes.channels],
        "cross_attention_dim": sizes.text_width,
        "use_linear_projection": True,
    }


def build_prior(config: PriorConfig, vae: Any, tokenizer_files: Any, dape: DAPE) -> Networks:
    """Fresh networks, all of U-Net, ControlNet, RCA and text encoder trained."""
    seed = config.stage2.loop.seed
    text_encoder, tokenizer = build_text_encoder(
        tokenizer_files, width=config.sizes.text_width, layers=config.sizes.text_layers, seed=seed
    )
    base = Base(
        unet_config=unet_config(config.sizes, latent_channels=vae.config.latent_channels),
        unet_state={},
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        scheduler={},
    )
    return trainable(build_networks(base, dape, config.stage2))


def fit_latents(networks: Networks, old_code: Tensor, new_code: Tensor) -> None:
    """Let networks that were trained on another autoencoder's latents go on with those of `networks.vae`.

    The first convolutions see what a linear map, fitted by least squares, makes of the new latents; the last one of the
    U-Net starts near nothing. All three have to learn.

    Args:
        networks: U-Net and ControlNet of the old latents.
        old_code: scaled latents of some pictures by the old autoencoder (B, C, h, w).
        new_code: those of the same pictures by the new one (B, D, h, w).
    """
    old, new = (code.movedim(1, -1).flatten(0, 2) for code in (old_code, new_code))
    fitted = torch.linalg.lstsq(new, old).solution
    channels = new.shape[1]
    for network in (networks.unet, networks.controlnet):
        network.conv_in = _replaced(network.conv_in, torch.einsum("ockl,dc->odkl", network.conv_in.weight, fitted))
        network.register_to_config(in_channels=channels)
    last = networks.unet.conv_out
    start = 0.01 * torch.randn((channels, *last.weight.shape[1:]), generator=seeded(0, Stream.NANO_WEIGHTS))
    networks.unet.conv_out = _replaced(last, start)
    networks.unet.register_to_config(out_channels=channels)


def _replaced(convolution: Any, weight: Tensor) -> nn.Conv2d:
    """A 3×3 convolution of these weights; the bias stays where it fits and is 0 elsewhere."""
    new = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    new.weight.data.copy_(weight.detach())
    same = convolution.bias.shape == new.bias.shape  # type: ignore[union-attr] # there is one
    new.bias.data.copy_(convolution.bias.detach()) if same else nn.init.zeros_(new.bias)  # type: ignore[union-attr, arg-type]
    return new


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

    def loss(self, step: int) -> tuple[Tensor, Figures]:
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
        return loss, {"loss_joint": loss.detach()}
