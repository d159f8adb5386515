"""A base model ready to run, from our single file or from a diffusers folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from . import sources
from .detect import Kind, require
from .metadata import as_dtype
from .sd import BaseParts, TokenizerFiles, read_base
from .tensorfile import load_tensors

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_UNET_NAMES = tuple(
    f"diffusion_pytorch_model{middle}" for middle in (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
)
_FOREIGN_TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 2048: "SDXL"}


@dataclass(kw_only=True, slots=True)
class Base:
    """A base model; the U-Net as data, since RCA is added when it is built."""

    unet_config: dict[str, Any]
    """diffusers config of the U-Net."""
    unet_state: dict[str, Tensor]
    """U-Net weights under diffusers' names, without RCA, in the file's dtype (memory-mapped)."""
    vae: Any
    """`AutoencoderKL` or `AutoencoderTiny`; its `config.scaling_factor` maps its latents to the U-Net's."""
    text_encoder: Any
    """`CLIPTextModel`; the U-Net reads its last hidden state (SD-2's folder already lacks the unused last layer)."""
    tokenizer: Any
    """`CLIPTokenizer`."""
    scheduler: dict[str, Any]
    """diffusers scheduler config."""


def load_base(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Base:
    """Load a base model.

    Args:
        path: a file of `write_base`, or a diffusers folder of SD-2-base or SD-turbo.
        dtype: of the autoencoder and the text encoder.

    Raises:
        WeightsError: missing, another model, damaged or unsafe; one sentence says which.
    """
    if Path(path).is_dir():
        return read_diffusers_base(path, dtype=dtype)
    parts = read_base(path)
    return Base(
        unet_config=parts.unet_config,
        unet_state=parts.unet_state,
        vae=_build_vae(parts, path, dtype),
        text_encoder=_build_text_encoder(parts, path, dtype),
        tokenizer=build_tokenizer(parts.tokenizer),
        scheduler=parts.scheduler,
    )


def read_diffusers_base(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Base:
    """Load a diffusers folder (`unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler`) of SD-2-base or SD-turbo.

    Raises:
        WeightsError: a part is missing, the model is of another family or predicts v, or a file is damaged.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    root = Path(folder)
    _check_parts(root)
    unet_config = _json(root / "unet" / "config.json")
    scheduler = _json(root / "scheduler" / "scheduler_config.json")
    _check_family(root, unet_config, scheduler)
    return Base(
        unet_config=unet_config,
        unet_state=_unet_state(root / "unet"),
        vae=_ready(_pretrained(AutoencoderKL, root / "vae"), dtype),
        text_encoder=_ready(_pretrained(CLIPTextModel, root / "text_encoder"), dtype),
        tokenizer=_pretrained(CLIPTokenizer, root / "tokenizer"),
        scheduler=scheduler,
    )


def build_tokenizer(files: TokenizerFiles) -> Any:
    """A `transformers.CLIPTokenizer` from its data."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        files.write(Path(folder))
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _build_vae(parts: BaseParts, path: str | os.PathLike[str], dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_config(parts.vae_config)
    return _ready(_filled(vae, parts.vae_state, f"{path}: the autoencoder"), dtype)


def _build_text_encoder(parts: BaseParts, path: str | os.PathLike[str], dtype: torch.dtype) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig(**parts.text_config))
    nested = any(key.startswith("text_model.") for key in encoder.state_dict())
    state = parts.text_state if nested else {k.removeprefix("text_model."): t for k, t in parts.text_state.items()}
    return _ready(_filled(encoder, state, f"{path}: the text encoder"), dtype)


def _ready(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    # Not the module's own `to`: diffusers' warns of every change of precision.
    return nn.Module.to(module, dtype).eval()


def _filled(module: nn.Module, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """Load strictly, except for position numbers, which some transformers versions keep as weights."""
    try:
        missing, extra = module.load_state_dict(as_dtype(state, torch.float32), strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{name} has weights of other sizes than its keys promise; the file is damaged.") from error
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing or extra:
        raise WeightsError(f"{name} does not fit: missing {missing[:3]}, left over {extra[:3]}; the file is damaged.")
    return module


def _check_parts(root: Path) -> None:
    absent = [name for name in _PARTS if not (root / name).is_dir()]
    if absent:
        expected = sources.BASE_FOLDER
        raise WeightsError(
            f"{root} has no {', '.join(absent)} inside; expected {expected.name}. Get it from {expected.where}."
        )


def _check_family(root: Path, unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """SeeSR was trained on an ε-predicting SD 2 with four input channels; neighbours are named and refused."""
    width, channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
    if width in _FOREIGN_TEXT_WIDTHS:
        raise sources.mismatch(root, f"{_FOREIGN_TEXT_WIDTHS[width]} (text width {width})", sources.BASE_FOLDER)
    if channels != 4:
        raise sources.mismatch(root, f"an inpainting or editing model ({channels} input channels)", sources.BASE_FOLDER)
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise sources.mismatch(root, f"a model that predicts {prediction} instead of epsilon", sources.BASE_FOLDER)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise WeightsError(
            f"{path} cannot be read: {reason}. Get {sources.BASE_FOLDER.name} from {sources.BASE_FOLDER.where}."
        ) from error


def _unet_state(folder: Path) -> dict[str, Tensor]:
    path = next((folder / name for name in _UNET_NAMES if (folder / name).is_file()), None)
    if path is None:
        expected = sources.BASE_FOLDER
        raise WeightsError(f"{folder} has no {_UNET_NAMES[0]}. Get {expected.name} from {expected.where}.")
    require(path, sources.BASE_FOLDER, Kind.UNET, Kind.SEESR_UNET)
    return load_tensors(path, lambda key: ".image_attentions." not in key)


def _pretrained(model_class: Any, folder: Path) -> Any:
    """`from_pretrained` without the network; its own errors say much, ours names the folder first."""
    half = {"variant": "fp16"} if _only_half(folder) else {}
    with _one_sentence(folder):
        return model_class.from_pretrained(folder, local_files_only=True, **half)


def _only_half(folder: Path) -> bool:
    """Whether a folder brings its weights only as the `fp16` variant."""
    names = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    return bool(names) and all(".fp16." in name for name in names)


@contextlib.contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        expected = sources.BASE_FOLDER
        raise WeightsError(
            f"{folder} cannot be loaded ({first}). Get {expected.name} again from {expected.where}."
        ) from error
