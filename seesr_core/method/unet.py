"""The denoising U-Net (SD-2-base or smaller) with RCA: diffusers' `UNet2DConditionModel` under the published names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rca import SOFT_PROMPT_DIM, add_rca


def build_unet(config: Mapping[str, Any], *, context_dim: int = SOFT_PROMPT_DIM) -> Any:
    """A randomly initialised `diffusers.UNet2DConditionModel` with RCA.

    Args:
        config: diffusers config, e.g. the published `seesr/unet/config.json`; keys that diffusers does not know are
        dropped. context_dim: width of the soft prompt.

    Called as `unet(x_B4hw, t, text_BLD, down_block_additional_residuals=…, mid_block_additional_residual=…,
    cross_attention_kwargs={"soft_prompt": tokens_BLD})`; returns ε of x's shape.
    """
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_config(known_config(UNet2DConditionModel, config))
    add_rca(model, context_dim)
    return model.eval()


def known_config(model_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a diffusers config that the installed diffusers knows; `use_image_cross_attention` is ours."""
    import inspect

    names = inspect.signature(model_class).parameters
    return {key: value for key, value in config.items() if key in names}
