"""A whole model in memory: base, control and tagger, checked against each other and put on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .dape import DAPE, Vocabulary
from .errors import SettingsError, WeightsError
from .formats.base import Base, load_base
from .formats.control import SOFT_WIDTH, ControlParts, read_control, read_published
from .formats.metadata import as_dtype
from .formats.ram import read_dape, read_ram_with_lists
from .formats.segsr import change_control, read_segsr
from .formats.tensorfile import read_header
from .model_files import NANO, GivenFiles, ModelFiles, TaggerFiles, find_model, find_tagger
from .runtime.devices import AUTO, choose_device, choose_dtype
from .runtime.memory import require_memory
from .segsr.model import SegSR
from .settings import PRESETS, UpscaleSettings

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Networks:
    """The networks of one model."""

    unet: Any
    """U-Net with RCA."""
    controlnet: Any
    """ControlNet with RCA and its image encoder."""
    vae: Any
    """`AutoencoderTiny` or `AutoencoderKL`."""
    text_encoder: Any
    """`CLIPTextModel`."""
    tokenizer: Any
    """`CLIPTokenizer`."""
    dape: DAPE
    """The tagger, its adapters merged."""


@dataclass(kw_only=True, slots=True)
class Models(Networks):
    """Everything that upscaling needs; the networks are frozen and in evaluation mode.

    U-Net, ControlNet and autoencoder are in `dtype`, the text encoder in float32, and so is the tagger, since its
    thresholds are fine.
    """

    vocabulary: Vocabulary
    """The tags that the tagger knows, with their thresholds."""
    segsr: SegSR | None = None
    """SegDM and bridge, in float32, if segmentation is to be denoised beside the picture; see `with_segsr`."""
    name: str = ""
    """The name by which the user asked for the model."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Sampling defaults of this model, some of `UpscaleSettings`."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the networks are."""
    dtype: torch.dtype = torch.float32
    """Precision of U-Net, ControlNet and autoencoder."""


def load_models(
    model: str | Path = NANO,
    *,
    device: str = AUTO,
    dtype: str = AUTO,
    given: GivenFiles = GivenFiles(),  # noqa: B008 - frozen
) -> Models:
    """Load a model.

    Args:
        model: "nano" (embedded), or a folder with a base (a file of this project or a diffusers folder), a control part
            (`seesr*.safetensors` or the published folder) and a tagger (`dape*.safetensors`, or RAM's and DAPE's .pth
            with RAM's tag lists), in it or one level below.
        device: "auto", "cpu", "cuda" …
        dtype: "auto", "fp32", "bf16" or "fp16".
        given: parts named one by one, in the place of those of `model`.

    Raises:
        WeightsError: a part is missing, damaged, unsafe, of another model, or does not fit the others.
        SettingsError: unknown device or precision. ResourceError: too little memory for the weights.
    """
    place, precision = choose_device(device), choose_dtype(dtype, choose_device(device))
    files = find_model(model, given)
    require_memory(
        _weights_bytes(files, precision), f"The model {model}", "close other programs or choose a smaller model", place
    )
    base, control = load_base(files.base), _read_control(files.control)
    dape, vocabulary = read_tagger(files.tagger)
    _check_fit(files, base, control, dape)
    log.info("model %s on %s in %s", model, place, str(precision).removeprefix("torch."))
    return Models(
        unet=_place(_unet(files, base, control, precision), place),
        controlnet=_place(_controlnet(files, control, precision), place),
        vae=_place(base.vae, place, precision),
        text_encoder=_place(base.text_encoder, place),
        tokenizer=base.tokenizer,
        dape=_place(dape, place),
        vocabulary=vocabulary,
        name=str(model),
        defaults=_defaults(files.control, base, control),
        device=place,
        dtype=precision,
    )


def with_segsr(models: Models, path: Path) -> Models:
    """The models with SegSR, whose defaults go over theirs; the ControlNet is changed in place.

    Raises:
        WeightsError: a damaged file or one of another kind, or one for another ControlNet.
        SettingsError: it was trained with a model of other sizes.
    """
    segsr, control = read_segsr(path), models.controlnet.config
    segsr.check_fit(
        latent_channels=control.in_channels,
        token_width=models.dape.config.token_width,
        hint_channels=control.block_out_channels[0],
        name=str(path),
    )
    change_control(models.controlnet, segsr)
    defaults = {**models.defaults, **segsr.defaults}
    return replace(models, segsr=segsr.to(models.device), defaults=defaults)


def load_tagger(
    model: str | Path = NANO,
    *,
    device: str = AUTO,
    given: GivenFiles = GivenFiles(),  # noqa: B008 - frozen
) -> tuple[DAPE, Vocabulary]:
    """The tagger of a model alone; arguments and errors as `load_models`."""
    place = choose_device(device)
    dape, vocabulary = read_tagger(find_tagger(model, given))
    return _place(dape, place), vocabulary


def _read_control(path: Path) -> ControlParts:
    return read_published(path) if path.is_dir() else read_control(path)


def read_tagger(files: TaggerFiles) -> tuple[DAPE, Vocabulary]:
    """A tagger in float32 on the CPU, and its tags.

    Raises:
        WeightsError: a damaged file or one of another kind, or a tag list of another model.
    """
    if files.tag_lists is None:
        return read_dape(files.weights)
    return read_ram_with_lists(files.weights, files.adapter, files.tag_lists)


def _check_fit(files: ModelFiles, base: Base, control: ControlParts, dape: DAPE) -> None:
    if misfit := control.misfit(base.unet_config, dape.config.token_width):
        name, wanted, found = misfit
        other = files.tagger.weights if name == SOFT_WIDTH else files.base
        raise WeightsError(
            f"{files.control} was trained on {control.base or 'an unnamed base'} with {name} {wanted}, {other} has "
            f"{found}: use the one that it was trained with."
        )


def _unet(files: ModelFiles, base: Base, control: ControlParts, dtype: torch.dtype) -> Any:
    from .method.unet import build_unet

    state = {**base.unet_state, **control.rca_state}
    return _filled(lambda: build_unet(base.unet_config, context_dim=control.context_dim), state, dtype, files.base)


def _controlnet(files: ModelFiles, control: ControlParts, dtype: torch.dtype) -> Any:
    from .method.controlnet import build_controlnet

    return _filled(
        lambda: build_controlnet(control.controlnet_config, context_dim=control.context_dim),
        control.controlnet_state,
        dtype,
        files.control,
    )


def _filled(build: Callable[[], Any], state: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> Any:
    """A network around `state`, without drawing random weights first."""
    with torch.device("meta"):
        network = build()
    try:
        network.load_state_dict(as_dtype(state, dtype), assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise WeightsError(f"{path}: its weights do not make the network of its configuration ({reason}).") from error
    return network


def _place(module: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    module.requires_grad_(False).eval()
    # Not the module's own `to`: diffusers' warns of every change of precision. Convolutions are faster channels last.
    move: Any = nn.Module.to
    return move(module, device=device, dtype=dtype, memory_format=torch.channels_last)


def base_defaults(base: Base) -> dict[str, Any]:
    """Sampling defaults that a base model brings by itself: SD-turbo's few steps, told by its scheduler, or none."""
    return dict(PRESETS["turbo"]) if base.scheduler.get("timestep_spacing") == "trailing" else {}


def _defaults(path: Path, base: Base, control: ControlParts) -> dict[str, Any]:
    defaults = {**base_defaults(base), **control.defaults}
    try:
        UpscaleSettings.for_model(defaults)
    except SettingsError as error:
        raise WeightsError(f"{path}: its sampling defaults are not usable. {error}") from error
    return defaults


def _weights_bytes(files: ModelFiles, dtype: torch.dtype) -> int:
    """Bytes of all weights once loaded: text encoder and tagger in float32, the rest in `dtype`."""
    in_dtype = {_part(files.base, "unet"), _part(files.base, "vae"), _part(files.control, "controlnet")}
    in_float32 = {_part(files.base, "text_encoder"), files.tagger.weights} - in_dtype
    return sum(_parameters(path) for path in in_dtype) * dtype.itemsize + sum(map(_parameters, in_float32)) * 4


def _part(path: Path, name: str) -> Path:
    """The largest file of a diffusers folder's part; a single file stands for itself."""
    if path.is_file():
        return path
    files = [file for file in (path / name).glob("*") if file.suffix in (".safetensors", ".bin")]
    return max(files, key=lambda file: file.stat().st_size, default=path / name)


def _parameters(path: Path) -> int:
    return read_header(path).parameters() if path.is_file() else 0
