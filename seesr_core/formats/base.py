"""A base model ready to run, from our single file or from a diffusers folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from . import configs, sources
from .border import one_sentence
from .detect import Kind, require
from .metadata import as_dtype
from .schema import MalformedError, read_json
from .sd import BaseParts, TokenizerFiles, read_base
from .tensorfile import load_tensors

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_DIFFUSERS = "diffusion_pytorch_model"
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
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
    with one_sentence(path, sources.BASE_FILE):
        return Base(
            unet_config=parts.unet_config,
            unet_state=parts.unet_state,
            vae=_build_vae(parts, path, dtype),
            text_encoder=_build_text_encoder(parts.text_config, parts.text_state, path, dtype),
            tokenizer=build_tokenizer(parts.tokenizer),
            scheduler=parts.scheduler,
        )


def read_diffusers_base(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Base:
    """Load a diffusers folder (`unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler`) of SD-2-base or SD-turbo.

    Raises:
        WeightsError: a part is missing, the model is of another family or predicts v, or a file is damaged.
    """
    root = Path(folder)
    _check_parts(root)
    unet_config = _config(root / "unet" / "config.json", configs.UNet)
    scheduler = _config(root / "scheduler" / "scheduler_config.json", configs.Scheduler)
    _check_family(root, unet_config, scheduler)
    return Base(
        unet_config=unet_config,
        unet_state=_unet_state(root / "unet"),
        vae=_folder_vae(root / "vae", dtype),
        text_encoder=_folder_text_encoder(root / "text_encoder", dtype),
        tokenizer=folder_tokenizer(root / "tokenizer"),
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


def _build_text_encoder(
    config: Mapping[str, Any], state: Mapping[str, Tensor], path: str | os.PathLike[str], dtype: torch.dtype
) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(CLIPTextConfig(**config))
    nested = any(key.startswith("text_model.") for key in encoder.state_dict())
    plain = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    own = {f"text_model.{key}": tensor for key, tensor in plain.items()} if nested else plain
    return _ready(_filled(encoder, own, f"{path}: the text encoder"), dtype)


def _ready(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    # Not the module's own `to`: diffusers' warns of every change of precision.
    return nn.Module.to(module, dtype).eval()


def _filled(module: nn.Module, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """Load strictly, except for position numbers, which some transformers versions keep as weights."""
    try:
        missing, extra = module.load_state_dict(as_dtype(state, torch.float32), strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{name} has weights of other sizes than its keys promise; the file is damaged.") from error
    missing, extra = ([key for key in keys if not key.endswith("position_ids")] for keys in (missing, extra))
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


def _config(path: Path, kind: Any) -> dict[str, Any]:
    try:
        return configs.taken(kind, read_json(path))
    except (OSError, MalformedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(
            f"{path} cannot be read: {reason}. Get {sources.BASE_FOLDER.name} from {sources.BASE_FOLDER.where}."
        ) from error


def _unet_state(folder: Path) -> dict[str, Tensor]:
    path = _weights(folder, _DIFFUSERS)
    require(path, sources.BASE_FOLDER, Kind.UNET, Kind.SEESR_UNET)
    return load_tensors(path, lambda key: ".image_attentions." not in key)


def _weights(folder: Path, stem: str) -> Path:
    """The weights file of a folder: safetensors before pickles, full precision before half."""
    suffixes = [".safetensors", ".bin"] if stem == _DIFFUSERS else [".safetensors"]
    names = [f"{stem}{half}{suffix}" for suffix in suffixes for half in ("", ".fp16")]
    if stem != _DIFFUSERS:
        names += ["pytorch_model.bin", "pytorch_model.fp16.bin"]
    path = next((folder / name for name in names if os.path.isfile(folder / name)), None)
    if path is None:
        expected = sources.BASE_FOLDER
        raise WeightsError(f"{folder} has no {names[0]}. Get {expected.name} from {expected.where}.")
    return path


def _folder_vae(folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderKL

    config = _config(folder / "config.json", configs.AutoencoderKL)
    with one_sentence(folder, sources.BASE_FOLDER):
        state = {_new_attention(key): tensor for key, tensor in load_tensors(_weights(folder, _DIFFUSERS)).items()}
        vae = AutoencoderKL.from_config(config)
        shapes = {key: tensor.shape for key, tensor in vae.state_dict().items()}
        # Old files keep the projections of the attention as 1×1 convolutions.
        own = {key: t.reshape(shapes[key]) if _is_pointwise(t, shapes.get(key)) else t for key, t in state.items()}
        return _ready(_filled(vae, own, str(folder)), dtype)


def _new_attention(key: str) -> str:
    """The name that an autoencoder's attention weight has today; files of old diffusers have others."""
    stem, dot, name = key.rpartition(".")
    module, _, part = stem.rpartition(".")
    return f"{module}.{_OLD_ATTENTION[part]}{dot}{name}" if ".attentions." in key and part in _OLD_ATTENTION else key


def _is_pointwise(tensor: Tensor, shape: tuple[int, ...] | None) -> bool:
    return shape is not None and len(shape) == 2 and tuple(tensor.shape) == (*shape, 1, 1)


def _folder_text_encoder(folder: Path, dtype: torch.dtype) -> nn.Module:
    config = _config(folder / "config.json", configs.TextEncoder)
    with one_sentence(folder, sources.BASE_FOLDER):
        state = load_tensors(_weights(folder, "model"))
        return _build_text_encoder(config, state, folder, dtype)


def folder_tokenizer(folder: Path) -> Any:
    """Built by transformers from its own files, which are data of fixed form."""
    from transformers import CLIPTokenizer

    with one_sentence(folder, sources.BASE_FOLDER):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if not isinstance(tokenizer.model_max_length, int):
        raise WeightsError(f"{folder}: model_max_length of tokenizer_config.json should be a whole number.")
    return tokenizer
