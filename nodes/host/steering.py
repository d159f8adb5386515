"""Patches of a MODEL that steer what its networks predict: guidance by a mask, and the fidelity dial.

Both see the whole latent: tiles, ControlNets and attention patches do their work inside the prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...seesr_core.errors import SettingsError
from ...seesr_core.method.guidance import guides, pull, pulled, targeted
from ...seesr_core.method.regions import check_masks, guidance_share
from ...seesr_core.tiling.grid import PIXELS_PER_CELL
from .photo_masks import by_photo
from .report import warn_on_node
from .sampler import check_latent

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

GUIDANCE_KEY = "seesr_guidance"
"""Under which a MODEL carries what watches over the spatial guidance, and a run what became of it."""
INTERVAL_KEY = "seesr_guidance_interval"
"""Under which a MODEL carries where in the noise schedule it is guided."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """The fidelity dial, after guidance (the host's post-CFG function)."""

    z_lr: Tensor
    """Scaled latents of the photos, (B, C, h, w)."""
    fidelity: float
    """0 … 1."""
    decay: float
    """The larger, the earlier the pull ends."""

    def __call__(self, args: dict[str, Any]) -> Tensor:
        """The clean latents of a step, pulled to the photos'."""
        x0: Tensor = args["denoised"]
        if x0.shape[1:] != self.z_lr.shape[1:] or len(x0) % len(self.z_lr):
            raise SettingsError(
                f"SeeSR Fidelity got a LATENT of shape {tuple(self.z_lr.shape)}, but {tuple(x0.shape)} is being "
                "sampled; connect the latent of the same SeeSR Latent Init to both."
            )
        z_lr = comfy.utils.repeat_to_batch_size(self.z_lr, len(x0)).to(x0)
        share = pull(self.fidelity, self.decay, args["sigma"].float(), _first_sigma(args))
        return pulled(x0, z_lr, share.clamp(0, 1).view(-1, 1, 1, 1).to(x0))


def attach_fidelity(model: ModelPatcher, latent: dict[str, Any], *, fidelity: float, decay: float) -> ModelPatcher:
    """A clone of `model` whose samples stay nearer to `latent`, in place of an older pull; at 0 it has none.

    Raises:
        SettingsError: no LATENT of pictures for this model.
    """
    check_latent(model, latent)
    patched = model.clone()
    _drop(patched, "sampler_post_cfg_function", Fidelity)
    if fidelity > 0:
        z_lr = model.get_model_object("latent_format").process_in(latent["samples"].float())
        patched.set_model_sampler_post_cfg_function(Fidelity(z_lr=z_lr, fidelity=fidelity, decay=decay))
    return patched


@dataclass(frozen=True, kw_only=True)
class SpatialGuidance:
    """Guidance by a mask, before guidance (the host's pre-CFG function)."""

    masks: tuple[Tensor, ...]
    """One (N, H, W) for each photo of the batch, or one for all; values in [0, 1], the largest of a photo's counts."""
    outside: float
    """Share of the guidance where no mask is."""
    feather: float
    """Width of the soft edge in latent cells."""
    _shares: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def __call__(self, args: dict[str, Any]) -> list[Tensor]:
        """The predictions [positive, negative, …] of a step, the positive one as far as the mask goes."""
        positive, negative, *rest = args["conds_out"]
        run = args["model_options"].get("transformer_options", {}).get(GUIDANCE_KEY)
        if run is not None:
            run.asked, run.guided = True, args["conds"][1] is not None
        if args["conds"][1] is None:
            return [positive, negative, *rest]
        share = self._share(len(positive), *positive.shape[-2:])
        return [targeted(negative, positive, share.to(positive.device)), negative, *rest]

    def _share(self, batch: int, height: int, width: int) -> Tensor:
        """(1 or B, 1, h, w)."""
        key = batch, height, width
        if key not in self._shares:
            own = len(self.masks) == batch
            shares = [
                guidance_share(masks, height, width, outside=self.outside, feather=self.feather)
                for masks in (self.masks if own else [torch.cat(self.masks)])
            ]
            self._shares[key] = torch.cat(shares)
        return self._shares[key]


def attach_guidance_interval(model: ModelPatcher, start: float, end: float) -> ModelPatcher:
    """A clone of `model` that is guided between two shares of the noise schedule only, in place of an older interval.

    Outside it the guider's cfg is 1, as the host's CFG Override sets it, which hosts before 0.33 lack.
    """
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, INTERVAL_KEY)
    if (start, end) == (0.0, 1.0):
        return patched
    sampling = model.get_model_object("model_sampling")

    def predict(executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        cfg = guider.cfg
        if not guides((start, end), float(sampling.timestep(sigma.flatten()[:1]))):
            guider.cfg = 1.0
        try:
            return executor(x, sigma, *args, **kwargs)
        finally:
            guider.cfg = cfg

    patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, INTERVAL_KEY, predict)
    return patched


@dataclass(slots=True)
class _GuidanceRun:
    asked: bool = False
    guided: bool = False


def attach_spatial_guidance(model: ModelPatcher, mask: Tensor, *, outside: float, feather: float) -> ModelPatcher:
    """A clone of `model` whose guidance acts where `mask` (N, H, W) is; masks of ones, or `outside` 1, leave it out.

    `feather` is in pixels of the result. An older mask on the model is replaced. Masks that know their photos (see
    `photo_masks`) guide each photo of a batch by its own; of others the largest counts, for every photo.

    Raises:
        SettingsError: something that is no mask.
    """
    masks = tuple(map(_some, by_photo(mask, check_masks(mask, "mask"))))
    patched = model.clone()
    _drop(patched, "sampler_pre_cfg_function", SpatialGuidance)
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, GUIDANCE_KEY)
    if outside < 1 and any(bool((own.amax(0) < 1).any()) for own in masks):
        patched.set_model_sampler_pre_cfg_function(
            SpatialGuidance(masks=masks, outside=outside, feather=feather / PIXELS_PER_CELL)
        )
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, GUIDANCE_KEY, _watch_guidance)
    return patched


def _some(masks_NHW: Tensor) -> Tensor:
    """A photo without tags is guided everywhere, as it is alone."""
    return masks_NHW if len(masks_NHW) else masks_NHW.new_ones(1, *masks_NHW.shape[1:])


def _watch_guidance(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a sampling run: says so if the mask could not act in it."""
    run = _GuidanceRun()
    executor.class_obj.model_options.setdefault("transformer_options", {})[GUIDANCE_KEY] = run
    result = executor(*args, **kwargs)
    if not run.asked:
        warn_on_node(
            "SeeSR Spatial Guidance did nothing in this run: its guider leaves out the host's pre-CFG step (as "
            "DualCFGGuider does). Sample with CFGGuider, KSampler or SeeSR Tiled Sampler."
        )
    elif not run.guided:
        warn_on_node(
            "SeeSR Spatial Guidance did nothing in this run: at cfg 1 there is no guidance to place. Raise cfg above 1."
        )
    return result


def _first_sigma(args: dict[str, Any]) -> float:
    """The highest noise level of the run; of the model's whole schedule where the host does not tell."""
    sigmas = args["model_options"].get("transformer_options", {}).get("sample_sigmas")
    return float(args["model"].model_sampling.sigma_max if sigmas is None else sigmas.max())


def _drop(model: ModelPatcher, name: str, kind: type) -> None:
    """Take patches of one kind out of a list of `model` (already a clone)."""
    if name in model.model_options:
        kept = [patch for patch in model.model_options[name] if not isinstance(patch, kind)]
        model.model_options[name] = kept
