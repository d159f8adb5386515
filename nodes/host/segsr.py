"""SEGSR_MODEL, and a host's sampling run in which a segmentation is denoised beside the picture.

The wrappers see whole latents: tiles, guidance and ControlNets do their work inside the prediction. All that a run
knows lies in its own options and goes with it; its labels travel with the latent that it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...seesr_core.errors import SettingsError
from ...seesr_core.formats.segsr import control_deltas, read_segsr
from ...seesr_core.method.schedule import acp_from_sigma
from ...seesr_core.segsr.joint import JointRun, segmentation_noise
from ...seesr_core.segsr.labels import VOID, label_latent
from ...seesr_core.segsr.model import ClassList, SegSR
from ...seesr_core.segsr.tiles import LabelPredictor
from ...seesr_core.tiling.grid import TiledDenoiser
from ..schema import unit_range
from . import keys
from .conds import Conditioning
from .control import SEGMENTATION, SeeSRControl, chain
from .tiling.tiles import KEY as TILES
from .tiling.tiles import TileSettings

if TYPE_CHECKING:
    from .dape import HostDAPE

KEY = "segsr"
"""Under which a MODEL carries our wrappers, and a run what it knows."""
_LABELS = "segsr_labels"
"""Attribute of a sampled latent that holds its labels."""
_SURE = 0.5
"""What a mask must say for its class to be known."""
_TOLERANCE = 8.0
"""Levels by which a colour may differ from the palette's."""


@dataclass(kw_only=True, slots=True, eq=False)
class SegSRModel:
    """SegDM and bridge in the host's patcher."""

    patcher: ModelPatcher
    """Holds the networks; the host moves them between devices."""
    name: str
    """Name for messages: the file's."""

    @property
    def networks(self) -> SegSR:
        """The networks, wherever they are now."""
        networks: SegSR = self.patcher.model
        return networks

    @property
    def classes(self) -> ClassList:
        """What the labels mean."""
        return self.networks.classes

    def get_models(self) -> list[ModelPatcher]:
        """What the host's bookkeeping of a prompt asks for."""
        return [self.patcher]

    def on_device(self) -> SegSR:
        """The networks where they compute, all of them: layers of plain PyTorch work only where they lie."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.networks


def load_segsr_model(path: Path) -> SegSRModel:
    """Read a `segsr*.safetensors` file.

    Raises:
        WeightsError: another kind of file or a damaged one.
    """
    return wrap_segsr(read_segsr(path), name=path.name)


def wrap_segsr(segsr: SegSR, *, name: str) -> SegSRModel:
    """Put the networks under the host's memory management; they compute in float32."""
    # Looked up late: the host may replace the class at start, and old hosts have only the plain one.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", ModelPatcher)
    patcher = patcher_class(
        segsr,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return SegSRModel(patcher=patcher, name=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledLabels:
    """The classes of a sampled latent."""

    labels: Tensor
    """(B, h, w), int64 on the CPU."""
    classes: ClassList
    """What they mean."""


def labels_of(latent: dict[str, Any]) -> SampledLabels:
    """The labels that came with a sampled LATENT.

    Raises:
        SettingsError: it has none.
    """
    found = getattr(latent["samples"], _LABELS, None)
    if not isinstance(found, SampledLabels):
        raise SettingsError(
            "The LATENT brings no segmentation: connect the latent output of the sampler whose MODEL comes from SegSR "
            "Apply, with no node between them that changes the latent."
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class SegSRPatch:
    """What a MODEL carries from SegSR Apply."""

    segsr: SegSRModel
    """The networks."""
    tokens_BLD: Tensor
    """The tagger's tokens of the photos."""
    strength: float
    """Factor on what the picture is told."""
    labels_BHW: Tensor | None = None
    """A segmentation to start from; None knows nothing."""

    def around_run(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """A sampling run (`WrappersMP.OUTER_SAMPLE`)."""
        guider = executor.class_obj
        run = self._run(guider, latent_image, seed or 0)
        guider.model_options.setdefault("transformer_options", {})[KEY] = run
        result: Tensor = executor(
            noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs
        )
        # Where the host moves it next: a tensor that stays itself keeps its labels.
        dtype = getattr(comfy.model_management, "intermediate_dtype", lambda: torch.float32)()
        result = result.to(device=comfy.model_management.intermediate_device(), dtype=dtype)
        setattr(result, _LABELS, SampledLabels(labels=run.labels().cpu(), classes=self.segsr.classes))
        return result

    def around_prediction(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None
    ) -> Tensor:
        """One guided prediction of whole latents (`WrappersMP.PREDICT_NOISE`): clean latents."""
        run = model_options.get("transformer_options", {}).get(KEY)
        if run is None:
            result: Tensor = executor(x, timestep, model_options, seed)
            return result
        acp = acp_from_sigma(float(timestep.flatten()[0]))
        _tell(executor.class_obj.conds, run.at(acp).condition)
        result = executor(x, timestep, model_options, seed)
        run.saw(acp, result)
        return result

    @torch.no_grad()
    def _run(self, guider: Any, latent_image: Tensor, seed: int) -> JointRun:
        z_lr = self._z_lr(guider, latent_image)
        networks = self.segsr.on_device()
        device = next(networks.parameters()).device
        tokens = comfy.utils.repeat_to_batch_size(self.tokens_BLD, len(z_lr)).float().to(device)
        features = networks.segdm.features(z_lr.to(device), tokens)
        tiles = _tiles(guider.model_options) or TileSettings(tile=max(z_lr.shape[2:]), overlap=0)
        whole = LabelPredictor(
            segsr=networks,
            features=features,
            tiled=partial(
                TiledDenoiser, tile=tiles.tile, overlap=tiles.overlap, layout=tiles.layout, window=tiles.window
            ),
        )

        def predict(noisy: Tensor, acp: float, image: Tensor | None) -> Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.segsr.on_device()
            return whole(noisy, acp, image)

        like = torch.empty(len(z_lr), networks.bits, *z_lr.shape[2:], device=device)
        noise = segmentation_noise([seed + i for i in range(len(z_lr))], like)
        return JointRun(networks, predict, noise, initial=self._initial(z_lr), strength=self.strength)

    def _initial(self, z_lr: Tensor) -> Tensor | None:
        if self.labels_BHW is None:
            return None
        bits = label_latent(self.labels_BHW, self.segsr.networks.codes, *z_lr.shape[2:])
        return comfy.utils.repeat_to_batch_size(bits, len(z_lr))

    def _z_lr(self, guider: Any, latent_image: Tensor) -> Tensor:
        """The scaled latents of the photos, from which the run starts."""
        channels = self.segsr.networks.config.latent_channels
        if latent_image.ndim != 4 or latent_image.shape[1] != channels or not bool(torch.any(latent_image)):
            raise SettingsError(
                f"SegSR needs the encoded photo as the LATENT that is sampled, (batch, {channels}, height, width); "
                f"found {'an empty one' if latent_image.ndim == 4 else 'another kind'} of shape "
                f"{tuple(latent_image.shape)}. Connect the latent output of SeeSR Latent Init to the sampler."
            )
        if len(latent_image) % len(self.tokens_BLD):
            raise SettingsError(
                f"SegSR Apply got {len(self.tokens_BLD)} photos, but {len(latent_image)} latents are being sampled; "
                "expected as many latents as photos, or a multiple."
            )
        z_lr: Tensor = guider.model_patcher.model.process_latent_in(latent_image.float())
        return z_lr


def _tell(conds: dict[str, Any], condition: Tensor | None) -> None:
    """Give every conditioning of a run C_t for the next prediction, in place of an older one."""
    for entry in (entry for group in conds.values() for entry in group or ()):
        kept = {name: value for name, value in entry.get("model_conds", {}).items() if name != SEGMENTATION}
        told = {} if condition is None else {SEGMENTATION: comfy.conds.CONDNoiseShape(condition)}
        entry["model_conds"] = {**kept, **told}


def _tiles(model_options: dict[str, Any]) -> TileSettings | None:
    """How the picture of a run is tiled, if it is."""
    wrappers = comfy.patcher_extension.get_wrappers_with_key(
        WrappersMP.CALC_COND_BATCH, TILES, model_options, is_model_options=True
    )
    return next((wrapper.__self__.settings for wrapper in wrappers), None)


def attach_segsr(model: ModelPatcher, patch: SegSRPatch) -> ModelPatcher:
    """A clone of `model` that denoises a segmentation as well, in place of an older one."""
    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, patch.around_run),
        (WrappersMP.PREDICT_NOISE, patch.around_prediction),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    patched.remove_additional_models(KEY)
    patched.set_additional_models(KEY, patch.segsr.get_models())
    return patched


def tell_control(prompts: Sequence[Conditioning], segsr: SegSRModel, strength: float) -> list[Conditioning]:
    """Conditionings whose ControlNet of ours listens to the segmentation and has learnt what the file brings.

    Raises:
        SettingsError: one has no ControlNet of ours, or one of another size.
    """
    twins: dict[Any, Any] = {}

    def told(control: Any) -> Any:
        if control is None:
            return None
        if control not in twins:
            twin = _listening(control, segsr, strength) if isinstance(control, SeeSRControl) else control.copy()
            twins[control] = twin.set_previous_controlnet(told(control.previous_controlnet))
        return twins[control]

    for prompt in prompts:
        for _, extras in prompt:
            _require_control(extras.get("control"), segsr)
    return [[[tokens, {**extras, "control": told(extras["control"])}] for tokens, extras in p] for p in prompts]


def _require_control(control: Any, segsr: SegSRModel) -> None:
    ours = next((link for link in chain(control) if isinstance(link, SeeSRControl)), None)
    if ours is None:
        raise SettingsError(
            "SegSR Apply needs conditionings with SeeSR's ControlNet: connect the outputs of SeeSR Apply (at a "
            "strength above 0) to its inputs model, positive and negative."
        )
    width, expected = ours.control_model.model_channels, segsr.networks.config.hint_channels
    if width != expected:
        raise SettingsError(
            f"{segsr.name} was trained with a ControlNet of first width {expected}, this one has {width}; choose the "
            "SeeSR model that it was trained with."
        )


def _listening(control: SeeSRControl, segsr: SegSRModel, strength: float) -> SeeSRControl:
    """A copy that takes C_t among its inputs, its weights changed as far as `strength` goes."""
    twin = control.copy()
    twin.extra_conds = [*(name for name in twin.extra_conds if name != SEGMENTATION), SEGMENTATION]
    deltas = control_deltas(segsr.networks)
    if deltas and strength:
        patches = keys.controlnet_to_host(deltas, control.diffusers_config)
        twin.control_model_wrapped = control.control_model_wrapped.clone()
        known = twin.control_model_wrapped.add_patches(
            {name: ("diff", (delta,)) for name, delta in patches.items()}, strength
        )
        if len(known) != len(patches):
            raise SettingsError(
                f"{segsr.name} changes weights that this ControlNet does not have; choose the SeeSR model that it was "
                "trained with."
            )
    return twin


def check_tokens(tokens: Any, dape: HostDAPE, segsr: SegSRModel, photos: int) -> None:
    """Refuse soft prompts of another tagger than the networks were trained with, or of other photos.

    Raises:
        SettingsError: any of these.
    """
    expected = (photos, dape.config.tokens, dape.config.token_width)
    if not isinstance(tokens, Tensor) or tuple(tokens.shape) != expected:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise SettingsError(
            f"SegSR Apply expected a soft prompt of shape {expected}, from this DAPE and of these {photos} photos, "
            f"found {found}; connect SeeSR Soft Prompt of the same photos and the same DAPE."
        )
    if expected[2] != segsr.networks.config.token_width:
        raise SettingsError(
            f"The soft prompt is {expected[2]} wide, {segsr.name} was trained with "
            f"{segsr.networks.config.token_width}; choose the DAPE that it was trained with."
        )


def read_segmentation(given: Tensor | None, classes: ClassList, size: Sequence[int]) -> Tensor | None:
    """Labels (B, H, W) of a segmentation to start from: a picture in the palette's colours, or a mask per class.

    Args:
        given: IMAGE (B, H, W, C) or MASK (K, H, W); None stays None.
        classes: the list.
        size: height and width of the photo that it belongs to.

    Raises:
        SettingsError: another number of masks than classes, another shape of picture, colours outside the palette, or
            nothing that is known anywhere.
    """
    if given is None:
        return None
    height, width = given.shape[1:3]
    if abs(height * size[1] - width * size[0]) > max(*size, height, width):
        raise SettingsError(
            f"The segmentation has {width} × {height} pixels, the prepared image {size[1]} × {size[0]}; expected the "
            "same proportions. Make it of the same photo."
        )
    labels = _from_masks(given, classes) if given.ndim == 3 else _from_picture(given, classes)
    if bool((labels == VOID).all()):
        raise SettingsError(
            "The segmentation says nothing: it is void (black, or no mask) everywhere. Disconnect it, or paint some."
        )
    return labels


def _from_masks(masks_KHW: Tensor, classes: ClassList) -> Tensor:
    if len(masks_KHW) != len(classes):
        raise SettingsError(
            f"SegSR Apply got {len(masks_KHW)} masks for a list of {len(classes)} classes; expected one mask for each, "
            f"in the order {', '.join(classes.names[:8])}{' …' if len(classes) > 8 else ''}."
        )
    share, labels = masks_KHW.float().max(0)
    return torch.where(share > _SURE, labels, VOID)[None]


def _from_picture(image_BHWC: Tensor, classes: ClassList) -> Tensor:
    palette = torch.tensor([*classes.palette, (0, 0, 0)], dtype=torch.float32)
    levels = unit_range(image_BHWC[..., :3]).cpu() * 255.0
    distance = torch.stack([(levels - colour).abs().amax(-1) for colour in palette])
    nearest, labels = distance.min(0)
    if float(nearest.max()) > _TOLERANCE:
        place = tuple(int(part) for part in torch.nonzero(nearest > _TOLERANCE)[0])
        colour = tuple(round(float(part)) for part in levels[place])
        raise SettingsError(
            f"The segmentation holds the colour {colour}, which stands for no class; expected the colours of the "
            "model's palette, as SegSR Segmentation draws them, and black for what is unknown."
        )
    return torch.where(labels == len(classes), VOID, labels)
