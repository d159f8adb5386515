"""The networks of stage 2, put together from a base model and a tagger; only what learns requires gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seesr_core import models
from seesr_core.dape import DAPE, Vocabulary, tagger_input
from seesr_core.errors import SettingsError, WeightsError
from seesr_core.formats.base import Base
from seesr_core.formats.control import RCA, ControlParts
from seesr_core.method.controlnet import controlnet_from_unet
from seesr_core.method.denoiser import predict_noise
from seesr_core.method.rca import rca_parameters
from seesr_core.method.text import encode_prompts
from seesr_core.method.unet import build_unet
from seesr_core.models import Models

from ..data.order import Stream, scoped_seed
from ..engine.adapters import add_lora
from ..engine.frozen import keep_frozen
from .recipes import Stage2Config


@dataclass(kw_only=True, slots=True)
class Networks(models.Networks):
    """The networks of stage 2: the ControlNet and the U-Net's RCA are trained, everything else is frozen."""

    @property
    def device(self) -> torch.device:
        """Where they are."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    def to(self, device: torch.device) -> Networks:
        """Move all networks."""
        for module in (self.unet, self.controlnet, self.vae, self.text_encoder, self.dape):
            module.to(device)
        return self

    def codes(self, image_B3HW: Tensor) -> Tensor:
        """What the autoencoder makes of images in [0, 1]: the posterior's mean and log-variance (B, 8, H/8, W/8), or of
        a deterministic one the latents (B, 4, H/8, W/8)."""
        # Convolutions that only look are faster with channels last, on CPUs and GPUs; what comes out has one layout,
        # whether it was just made or kept meanwhile, since the rounding of the trained networks depends on it.
        encoded = self.vae.encode((image_B3HW * 2 - 1).contiguous(memory_format=torch.channels_last))
        codes: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
        return codes.contiguous()

    def latents(self, codes: Tensor, generator: torch.Generator | list[torch.Generator]) -> Tensor:
        """Scaled latents of codes, drawn from the posterior by one generator or by one for each image."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        if codes.shape[1] != self.vae.config.latent_channels:
            codes = DiagonalGaussianDistribution(codes).sample(generator)  # type: ignore[arg-type] # lists, too
        return (codes * self.vae.config.scaling_factor).float()

    def encode_image(self, image: Tensor, generator: torch.Generator | list[torch.Generator]) -> Tensor:
        """Scaled latents of images in [0, 1]: samples of the posterior (one generator, or one for each image), or a
        deterministic autoencoder's codes."""
        return self.latents(self.codes(image), generator)

    def soft_prompt(self, condition: Tensor) -> Tensor:
        """DAPE's tokens of the upsampled LR, resized as the published training does."""
        size = self.dape.config.image_size
        return self.dape.encode_image(tagger_input(condition, size, antialias=False, mode="bicubic")).float()

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Last hidden state (B, 77, D)."""
        return encode_prompts(prompts, self.tokenizer, self.text_encoder)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> image in [0, 1]."""
        vae = self.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0].float().add(1).div(2).clamp(0, 1)

    def encode_mode(self, image: Tensor) -> Tensor:
        """Scaled latents of images in [0, 1] without any draw: the posterior's mean, or a deterministic one's codes."""
        codes = self.codes(image)[:, : self.vae.config.latent_channels]
        return (codes * self.vae.config.scaling_factor).float()

    def predict(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        *,
        image: Tensor,
        soft_prompt: Tensor | None,
        hint: Tensor | None = None,
    ) -> Tensor:
        """ε̂ of noisy latents x (B, C, h, w) at timesteps t (B,) by ControlNet and U-Net with RCA (`predict_noise`)."""
        return predict_noise(self.unet, self.controlnet, x, t, text, image=image, soft_prompt=soft_prompt, hint=hint)

    def as_models(self, vocabulary: Vocabulary, **more: Any) -> Models:
        """The same as the models that upscale; `more` are further fields."""
        return Models(
            unet=self.unet,
            controlnet=self.controlnet,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            dape=self.dape,
            vocabulary=vocabulary,
            name="training",
            device=self.device,
            **more,
        )


def build_networks(base: Base, dape: DAPE, config: Stage2Config, resume: ControlParts | None = None) -> Networks:
    """RCA fresh in the U-Net and the ControlNet a copy of its encoder, or both from `resume`; only what
    `config.trained` names requires gradients.

    The start of RCA and of adapters depends on `config.loop.seed` alone.

    Raises:
        SettingsError: a part alone is to be trained, of no weights.
        WeightsError: `resume` was trained on a base model of another family, or with another tagger.
    """
    hint_channels = config.hint_channels
    if resume is not None:
        _check_fit(base, dape, resume)
        hint_channels = tuple(resume.controlnet_config["conditioning_embedding_out_channels"])
    elif config.trained != "all":
        raise SettingsError(
            f"trained {config.trained!r} goes on from weights that exist: name them by --init, or choose 'all'."
        )
    with scoped_seed(config.loop.seed, Stream.STAGE2_WEIGHTS):
        unet = build_unet(base.unet_config, context_dim=dape.config.token_width)
        unet.load_state_dict({key: value.float() for key, value in base.unet_state.items()}, strict=False)
        controlnet = controlnet_from_unet(unet, hint_channels=hint_channels)
    if resume is not None:
        unet.load_state_dict(_float(resume.rca_state), strict=False)
        controlnet.load_state_dict(_float(resume.controlnet_state))
    networks = Networks(
        unet=unet.requires_grad_(False),
        controlnet=controlnet,
        vae=base.vae.requires_grad_(False),
        text_encoder=base.text_encoder.requires_grad_(False),
        tokenizer=base.tokenizer,
        dape=dape.requires_grad_(False).eval(),
    )
    choose_trained(networks, config)
    keep_frozen(unet, config.frozen_dtype, but=RCA)
    for frozen in (networks.vae, networks.text_encoder, networks.dape):
        keep_frozen(frozen, config.frozen_dtype)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    return networks


def choose_trained(networks: Networks, config: Stage2Config) -> None:
    """Let what `config.trained` names require gradients, and nothing else of U-Net and ControlNet."""
    unet, controlnet = networks.unet, networks.controlnet
    unet.requires_grad_(False)
    controlnet.requires_grad_(True)
    rca = list(rca_parameters(unet).values())
    if config.trained == "lora":
        rca = []
        with scoped_seed(config.loop.seed, Stream.STAGE2_ADAPTERS):
            add_lora(controlnet, config.lora_rank)
    elif config.trained != "all":
        controlnet.requires_grad_(False)
        rca = [*rca, *rca_parameters(controlnet).values()] if config.trained == "rca-image-encoder" else []
    for parameter in (*rca, *controlnet.controlnet_cond_embedding.parameters()):
        parameter.requires_grad_(True)


def _float(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() for key, value in state.items()}


def _check_fit(base: Base, dape: DAPE, start: ControlParts) -> None:
    """Refuse weights that do not go with the base model or the tagger."""
    if misfit := start.misfit(base.unet_config, dape.config.token_width):
        name, wanted, found = misfit
        raise WeightsError(
            f"The weights to start from ({start.base or 'of an unknown base model'}) were made for {name} {wanted}, "
            f"the base model or tagger has {found}. Choose those that they were trained with."
        )
