"""Wrong plugs of SeeSR Apply, each refused with one sentence before anything is sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.model_sampling
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ...seesr_core.errors import SettingsError
from ...seesr_core.tiling.grid import PIXELS_PER_CELL
from ..schema import require_finite
from .rca import text_transformers

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .seesr_model import SeeSRModel

_SD_LATENTS = 4
# Subclasses of the host's noise prediction that share only its input scaling.
_OTHER_PREDICTIONS = (comfy.model_sampling.V_PREDICTION, comfy.model_sampling.X0)


def check_model(model: ModelPatcher, seesr: SeeSRModel) -> None:
    """Refuse a MODEL that `seesr` was not made for.

    Raises:
        SettingsError: no U-Net, an inpainting or v-prediction model, or a U-Net of other sizes.
    """
    found = _misfit(model, seesr)
    if found is not None:
        raise SettingsError(
            f"MODEL {found}; {seesr.name} was made for {seesr.base or 'another base model'} (a U-Net of "
            f"{seesr.model_channels} channels, text width {seesr.text_dim}, predicting noise): load that with Load "
            "Checkpoint, or choose the SeeSR model that fits this one."
        )


def check_soft_prompt(soft_prompt_BLD: Any, seesr: SeeSRModel, *, photos: int) -> None:
    """Refuse soft prompts of another tagger, of other photos, or with NaN.

    Raises:
        SettingsError: any of these.
    """
    if not isinstance(soft_prompt_BLD, Tensor) or soft_prompt_BLD.ndim != 3:
        raise SettingsError("soft_prompt is no batch of tokens; connect SeeSR Soft Prompt.")
    count, _, width = soft_prompt_BLD.shape
    if width != seesr.context_dim:
        raise SettingsError(
            f"The soft prompt is {width} wide, but {seesr.name} attends to {seesr.context_dim}; choose the DAPE that "
            "belongs to it in SeeSR Load DAPE."
        )
    if count != photos:
        raise SettingsError(
            f"SeeSR Apply got soft prompts of {count} photos, but {photos} prepared images; make both from the same "
            "batch of photos."
        )
    advice = "check the photo and the DAPE file, or run DAPE in float32"
    require_finite(soft_prompt_BLD, "The soft prompt", advice)


def check_image(hint_B3HW: Tensor) -> None:
    """Refuse prepared images whose sides the autoencoder does not divide, or with NaN.

    Raises:
        SettingsError: either.
    """
    height, width = hint_B3HW.shape[-2:]
    if height % PIXELS_PER_CELL or width % PIXELS_PER_CELL:
        raise SettingsError(
            f"The prepared image has {width} × {height} pixels; expected sides that are multiples of 8, as SeeSR "
            "Prepare Image makes them."
        )
    require_finite(hint_B3HW, "The prepared image", "look for the node that made them")


def check_window(start: float, end: float) -> None:
    """Refuse a window that ends before it begins.

    Raises:
        SettingsError: it does.
    """
    if start > end:
        raise SettingsError(
            f"start_percent is {start:g} and end_percent {end:g}; expected the start to be no later than the end."
        )


def _misfit(model: ModelPatcher, seesr: SeeSRModel) -> str | None:
    """What is wrong with `model`, as the rest of a sentence; None if it fits."""
    inner = model.model
    family = type(getattr(inner, "model_config", inner)).__name__
    unet = getattr(inner, "diffusion_model", None)
    if not isinstance(unet, UNetModel):
        return f"is {family}, which is not a Stable Diffusion U-Net"
    if unet.in_channels not in (_SD_LATENTS, seesr.latent_channels):
        return f"is an inpainting or otherwise extended {family} with {unet.in_channels} input channels"
    sizes = (unet.model_channels, inner.model_config.unet_config.get("context_dim"))
    if sizes != (seesr.model_channels, seesr.text_dim) or unet.num_classes is not None:
        return f"is {family} with {sizes[0]} channels and text width {sizes[1]}"
    if unet.in_channels != seesr.latent_channels:
        return f"is {family} for latents of {unet.in_channels} channels instead of {seesr.latent_channels}"
    places = {block: layer.in_channels for block, layer in text_transformers(unet)}
    if places != {site.block: site.channels for site in seesr.rca.sites}:
        return f"is {family} with text attention in {len(places)} places of other widths or at other depths"
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.EPS) or isinstance(sampling, _OTHER_PREDICTIONS):
        return "predicts v or something else instead of noise"
    return None
