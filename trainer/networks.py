"""The networks of stage 2, put together from a base model and a tagger; only what learns requires gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seesr_core.checkpoints.base import Base
from seesr_core.checkpoints.control import ControlParts
from seesr_core.control import controlnet_from_unet
from seesr_core.dape import DAPE
from seesr_core.errors import WeightsError
from seesr_core.prior import build_unet
from seesr_core.rca import rca_parameters

from .data import scoped_seed
from .recipes import Stage2Config

_MUST_AGREE = ("block_out_channels", "cross_attention_dim")


@dataclass(kw_only=True, slots=True)
class Networks:
    """The networks of stage 2."""

    unet: Any
    """Frozen U-Net with trained RCA."""
    controlnet: Any
    """Trained."""
    vae: Any
    """Frozen."""
    text_encoder: Any
    """Frozen."""
    tokenizer: Any
    """Of the text encoder."""
    dape: DAPE
    """Frozen, adapters merged."""

    def to(self, device: torch.device) -> Networks:
        """Move all of them."""
        for module in (self.unet, self.controlnet, self.vae, self.text_encoder, self.dape):
            module.to(device)
        return self


def build_networks(base: Base, dape: DAPE, config: Stage2Config, resume: ControlParts | None = None) -> Networks:
    """RCA fresh in the U-Net (or from `resume`), the ControlNet a copy of the encoder; only they require gradients.

    RCA's start depends on `config.loop.seed` alone.

    Raises:
        WeightsError: `resume` was trained on a base model of another family, or with another tagger.
    """
    if resume is not None:
        _check_fit(base, dape, resume)
    with scoped_seed(config.loop.seed, 6):
        unet = build_unet(base.unet_config, context_dim=dape.config.token_width)
        unet.load_state_dict({key: value.float() for key, value in base.unet_state.items()}, strict=False)
        controlnet = controlnet_from_unet(unet, hint_channels=config.hint_channels)
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
    for parameter in rca_parameters(unet).values():
        parameter.requires_grad_(True)
    if config.trained == "rca-image-encoder":
        controlnet.requires_grad_(False)
        controlnet.controlnet_cond_embedding.requires_grad_(True)
        for parameter in rca_parameters(controlnet).values():
            parameter.requires_grad_(True)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        controlnet.enable_gradient_checkpointing()
    return networks


def _float(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() for key, value in state.items()}


def _check_fit(base: Base, dape: DAPE, start: ControlParts) -> None:
    """Refuse weights that do not go with the base model or the tagger."""
    pairs = {name: (start.unet_config.get(name), base.unet_config.get(name)) for name in _MUST_AGREE}
    pairs["width of the soft prompt"] = (start.context_dim, dape.config.token_width)
    for name, (expected, found) in pairs.items():
        if _plain(expected) != _plain(found):
            raise WeightsError(
                f"The weights to start from ({start.base or 'of an unknown base model'}) were made for {name} "
                f"{_plain(expected)}, the base model or tagger has {_plain(found)}. Choose those that they were "
                "trained with."
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
