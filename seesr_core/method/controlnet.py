"""The ControlNet with RCA: diffusers' `ControlNetModel` under the published names (paper §3.3)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .rca import SOFT_PROMPT_DIM, add_rca, soft_prompt_dim
from .unet import known_config


def build_controlnet(config: Mapping[str, Any], *, context_dim: int = SOFT_PROMPT_DIM) -> Any:
    """A randomly initialised `diffusers.ControlNetModel` with RCA.

    Args:
        config: diffusers config, e.g. the published `seesr/controlnet/config.json`.
        context_dim: width of the soft prompt.

    Called as `control(x_B4hw, t, text_BLD, controlnet_cond=image_B3HW, conditioning_scale=s, return_dict=False,
    cross_attention_kwargs={"soft_prompt": tokens_BLD})`, the image in [0, 1] at 8× the latent's size, or what
    `control.controlnet_cond_embedding` makes of it; returns the residuals of the down blocks and of the middle block,
    all multiplied by s.
    """
    from diffusers import ControlNetModel

    model = ControlNetModel.from_config(known_config(ControlNetModel, config))
    return _with_own_parts(model, context_dim).eval()


def controlnet_from_unet(unet: Any, *, hint_channels: tuple[int, ...] = (16, 32, 96, 256)) -> Any:
    """The start of stage 2: a copy of the U-Net's encoder, its RCA included, with zero output convolutions.

    Args:
        unet: U-Net with RCA.
        hint_channels: widths of the trainable image encoder; its strides (8 in all) lie between them.
    """
    from diffusers import ControlNetModel

    control = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=hint_channels, load_weights_from_unet=False
    )
    source = unet.state_dict()
    _with_own_parts(control, soft_prompt_dim(source) or SOFT_PROMPT_DIM)
    control.load_state_dict({key: source[key] for key in control.state_dict() if key in source}, strict=False)
    return control


def _with_own_parts(model: Any, context_dim: int) -> Any:
    """The same network, in place, with RCA and with an image encoder that is asked once in a run."""
    add_rca(model, context_dim)
    model.controlnet_cond_embedding.__class__ = _encoder_class()
    return model


_RGB = 3
"""Channels of a picture; what the image encoder makes of one has more."""


@functools.lru_cache(maxsize=1)
def _encoder_class() -> type:
    """An image encoder that lets pass what it found in an earlier step; made on first use, as RCA's is."""
    from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding

    class ImageEncoder(ControlNetConditioningEmbedding):
        def forward(self, conditioning: Tensor) -> Tensor:
            return super().forward(conditioning) if conditioning.shape[1] == _RGB else conditioning

    return ImageEncoder
