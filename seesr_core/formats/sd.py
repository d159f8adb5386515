"""The base model (U-Net, autoencoder, text encoder, tokenizer) as one file in Stable Diffusion's single-file layout.

Keys are those that stock checkpoint loaders expect (`model.diffusion_model.*`, `first_stage_model.*` with TAESD's
names, `cond_stage_model.transformer.text_model.*`). What has no place in keys travels as metadata: text and tokenizer
settings, vocabulary, noise schedule. What the text needs is a tensor as well, since such loaders drop metadata.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError
from . import configs, metadata, sources
from .border import one_sentence
from .detect import Kind, require
from .ldm import taesd_from_ldm, taesd_to_ldm, unet_from_ldm, unet_to_ldm
from .schema import MalformedError, Whole, parse_json, read
from .tensorfile import Header, load_tensors
from .unet_config import check_host_can_read, unet_config_from_ldm

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer."
TEXT_JSON = "cond_stage_model.text_json"
"""Key of `pack_text`'s tensor."""

SD_LATENT_SCALE = 0.18215
"""Readers of single files multiply every SD latent by this; `vae_scale` in the file takes it back for TAESD's."""

_TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_TINY_WIDTH, _TINY_DEPTHS = 64, {"num_encoder_blocks": (1, 3, 3, 3), "num_decoder_blocks": (3, 3, 3, 1)}


@dataclass(kw_only=True, slots=True)
class TokenizerFiles:
    """A CLIP byte-pair tokenizer as data."""

    vocab: dict[str, int]
    """Token → id."""
    merges: list[str]
    """Pairs in order of rank, the halves apart by a space."""
    config: dict[str, Any] = field(default_factory=lambda: {"model_max_length": 77})
    """Entries of `tokenizer_config.json`: length and special tokens."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenizerFiles:
        """Take the data out of a `transformers.CLIPTokenizer`, slow or fast."""
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            vocab, merges = _saved_vocabulary(Path(folder))
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        config = {name: str(getattr(tokenizer, name)) for name in names} | {
            "model_max_length": tokenizer.model_max_length
        }
        return cls(vocab=vocab, merges=merges, config=config)

    def write(self, folder: Path) -> None:
        """The three files that `CLIPTokenizer.from_pretrained` reads."""
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *self.merges, ""]), encoding="utf-8")
        config = {"tokenizer_class": "CLIPTokenizer", **self.config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


class _PackedTokenizer(TypedDict):
    vocab: dict[str, Whole]
    merges: list[str]
    config: configs.Tokenizer


class _PackedText(TypedDict):
    """What `pack_text` packs."""

    text_config: configs.TextEncoder
    tokenizer: _PackedTokenizer


@dataclass(kw_only=True, slots=True)
class BaseParts:
    """A base file's contents as plain data: configs and state dicts under diffusers' and transformers' names."""

    unet_config: dict[str, Any]
    """diffusers config of the U-Net."""
    unet_state: dict[str, Tensor]
    """U-Net weights (without RCA)."""
    vae_config: dict[str, Any]
    """Config of an `AutoencoderTiny`."""
    vae_state: dict[str, Tensor]
    """Autoencoder weights."""
    text_config: dict[str, Any]
    """Config of a `CLIPTextModel`."""
    text_state: dict[str, Tensor]
    """Text encoder weights, keys beginning with `text_model.`."""
    tokenizer: TokenizerFiles
    """The text encoder's tokenizer."""
    scheduler: dict[str, Any]
    """diffusers scheduler config (betas, prediction type)."""
    info: dict[str, Any] = field(default_factory=dict)
    """Provenance of the weights: recipe, steps, licence."""

    @classmethod
    def from_modules(
        cls,
        *,
        unet: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module,
        tokenizer: Any,
        scheduler: Mapping[str, Any],
        info: Mapping[str, Any] | None = None,
    ) -> BaseParts:
        """Collect the parts of trained modules.

        Args:
            unet: `UNet2DConditionModel`; RCA in it is left out.
            vae: `AutoencoderTiny`.
            text_encoder: `CLIPTextModel`.
            tokenizer: `CLIPTokenizer` or `TokenizerFiles`.
            scheduler: diffusers scheduler config.
            info: provenance.
        """
        files = tokenizer if isinstance(tokenizer, TokenizerFiles) else TokenizerFiles.from_tokenizer(tokenizer)
        return cls(
            unet_config=plain_config(unet),
            unet_state={key: t for key, t in unet.state_dict().items() if ".image_attentions." not in key},
            vae_config=plain_config(vae),
            vae_state=dict(vae.state_dict()),
            text_config={name: value for name, value in plain_config(text_encoder).items() if name in _TEXT_SIZES},
            text_state=text_keys(text_encoder.state_dict()),
            tokenizer=files,
            scheduler=dict(scheduler),
            info=dict(info or {}),
        )


def plain_config(module: Any) -> dict[str, Any]:
    """A diffusers or transformers module's config as JSON-able entries, private ones left out."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return {name: value for name, value in config.items() if not name.startswith("_")}


def text_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP text weights under `text_model.…`, which transformers 4 writes and transformers 5 leaves out."""
    named = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in named.items() if not key.endswith("position_ids")}


def write_base(path: str | os.PathLike[str], parts: BaseParts, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a base file that stock single-file loaders can take apart.

    Raises:
        SettingsError: sizes that such a loader would not detect, or weights that are not finite in `dtype`.
        ResourceError: the disk is full or cannot be written to.
    """
    check_host_can_read(parts.unet_config)
    _check_tiny_autoencoder(parts.vae_config, latent_channels=parts.unet_config["in_channels"])
    tensors = {f"{UNET}{key}": t for key, t in unet_to_ldm(parts.unet_state, parts.unet_config).items()}
    tensors |= {f"{VAE}{key}": t for key, t in taesd_to_ldm(parts.vae_state).items()}
    tensors |= {f"{TEXT}{key}": t for key, t in parts.text_state.items()}
    stored = metadata.cast(tensors, dtype)
    # In half precision the scale itself would be off by 1e-4.
    stored[f"{VAE}vae_scale"] = torch.tensor(SD_LATENT_SCALE / parts.vae_config.get("scaling_factor", 1.0))
    stored[f"{VAE}vae_shift"] = torch.tensor(0.0)
    stored[TEXT_JSON] = pack_text(parts.text_config, parts.tokenizer)
    metadata.save_safetensors(path, stored, metadata.encode(metadata.BASE, _fields(parts)))


def read_base(path: str | os.PathLike[str]) -> BaseParts:
    """Read what `write_base` wrote; all sizes come from the shapes.

    Raises:
        WeightsError: another kind of file, a damaged or newer one.
    """
    header = require(path, sources.BASE_FILE, Kind.BASE).header
    metadata.check_version(path, header.metadata, metadata.BASE)
    with one_sentence(path, sources.BASE_FILE):
        return _parts(path, header)


def _parts(path: str | os.PathLike[str], header: Header) -> BaseParts:
    tensors = load_tensors(path)
    unet = _below(tensors, UNET)
    unet_config = unet_config_from_ldm({key: tuple(t.shape) for key, t in unet.items()}, path)
    vae, text_state = _below(tensors, VAE), _below(tensors, TEXT)
    scale = float(vae["vae_scale"]) if "vae_scale" in vae else SD_LATENT_SCALE
    if not 0 < scale < math.inf:
        raise sources.unfit(
            path, f"the scale of its latents should be a number above 0, found {scale}", sources.BASE_FILE
        )
    return BaseParts(
        unet_config=unet_config,
        unet_state=unet_from_ldm(unet, unet_config),
        vae_config={
            "_class_name": "AutoencoderTiny",
            "latent_channels": unet_config["in_channels"],
            "scaling_factor": round(SD_LATENT_SCALE / scale, 6),
        },
        vae_state=taesd_from_ldm(vae),
        text_config={
            **metadata.field(path, header.metadata, "text_config", configs.TextEncoder),
            **_text_sizes(text_state, path),
        },
        text_state=text_state,
        tokenizer=_tokenizer(path, header.metadata),
        scheduler=metadata.field(path, header.metadata, "scheduler", configs.Scheduler),
        info=metadata.field(path, header.metadata, "info", dict[str, Any], {}),
    )


def pack_text(text_config: Mapping[str, Any], tokenizer: TokenizerFiles) -> Tensor:
    """Text settings and tokenizer as the bytes of a JSON text: uint8 (N,)."""
    text = json.dumps({"text_config": dict(text_config), "tokenizer": asdict(tokenizer)}, ensure_ascii=False)
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)


def unpack_text(packed_N: Tensor) -> tuple[dict[str, Any], TokenizerFiles]:
    """Inverse of `pack_text`.

    Raises:
        WeightsError: the bytes are something else.
    """
    try:
        found = read(_PackedText, parse_json(bytes(packed_N.cpu().to(torch.uint8).flatten().numpy())))
        return dict(found["text_config"]), TokenizerFiles(**found["tokenizer"])
    except MalformedError as error:
        raise WeightsError(
            f"The tokenizer in {TEXT_JSON} cannot be read ({error}): the file is damaged. Get it again."
        ) from error


def _fields(parts: BaseParts) -> dict[str, Any]:
    return {
        "text_config": parts.text_config,
        "tokenizer_vocab": parts.tokenizer.vocab,
        "tokenizer_merges": parts.tokenizer.merges,
        "tokenizer_config": parts.tokenizer.config,
        "scheduler": parts.scheduler,
        "info": parts.info,
    }


def _tokenizer(path: str | os.PathLike[str], fields: Mapping[str, str]) -> TokenizerFiles:
    return TokenizerFiles(
        vocab=metadata.field(path, fields, "tokenizer_vocab", dict[str, Whole]),
        merges=metadata.field(path, fields, "tokenizer_merges", list[str]),
        config=metadata.field(path, fields, "tokenizer_config", configs.Tokenizer),
    )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _text_sizes(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, int]:
    """The sizes of a CLIP text encoder that its weights show; the number of heads is not among them."""
    stem = "text_model.encoder.layers."
    try:
        vocab, hidden = state["text_model.embeddings.token_embedding.weight"].shape
        positions = state["text_model.embeddings.position_embedding.weight"].shape[0]
        intermediate = state[f"{stem}0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise sources.unfit(path, f"its text encoder lacks {error.args[0]}", sources.BASE_FILE) from error
    layers = 1 + max(int(key.removeprefix(stem).split(".")[0]) for key in state if key.startswith(stem))
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "max_position_embeddings": positions,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
    }


def _saved_vocabulary(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges from what `save_pretrained` left: separate files (transformers 4) or one (5)."""
    if (folder / "vocab.json").exists():
        merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        return vocab, [line for line in merges if line and not line.startswith("#version")]
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    return model["vocab"], [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]


def _check_tiny_autoencoder(config: Mapping[str, Any], *, latent_channels: int) -> None:
    """Readers of single files build TAESD with fixed widths and depths, of as many latent channels as its weights have.

    Raises:
        SettingsError: another autoencoder, or one of other latents than the U-Net's.
    """
    widths = {width for side in ("encoder", "decoder") for width in config.get(f"{side}_block_out_channels", ())}
    depths = {name: tuple(config.get(name, ())) for name in _TINY_DEPTHS}
    if widths != {_TINY_WIDTH} or depths != _TINY_DEPTHS or config.get("latent_channels") != latent_channels:
        raise SettingsError(
            f"A single file takes an autoencoder of TAESD's sizes ({_TINY_WIDTH} channels, {_TINY_DEPTHS}) and of the "
            f"U-Net's {latent_channels} latent channels; found channels {sorted(widths)}, {depths}, "
            f"{config.get('latent_channels')} latent channels."
        )
