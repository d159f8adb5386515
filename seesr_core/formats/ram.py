"""Taggers: the published RAM file with its DAPE adapter, and our own `dape*.safetensors` and `dape-lora*.safetensors`.

Canonical keys are the published RAM keys that inference needs; adapters are merged into the weights as they are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..dape import DAPE, DAPEConfig, Vocabulary, merge_published_lora
from ..dape.lora import SCALING, peft_lora_to_published
from ..errors import SettingsError, WeightsError
from . import metadata, sources
from .border import one_sentence
from .detect import FileKind, Kind, require
from .quantized import dequantized
from .schema import Number, Size
from .tensorfile import Header, load_tensors

_NEEDED = ("visual_encoder.", "tagging_head.", "label_embed", "wordvec_proj.", "fc.", "image_proj.")
_COMPUTED = ("relative_position_index", "attn_mask")
_OLD_HEAD = "vision_multi"


class _Adapter(TypedDict, total=False):
    """What is read back of peft's config."""

    r: Size
    lora_alpha: Number


def canonical_key(key: str) -> str | None:
    """The canonical name of a published RAM key; None for text nets and computed buffers."""
    name = key.replace(_OLD_HEAD, "tagging_head")
    return name if name.startswith(_NEEDED) and not name.endswith(_COMPUTED) else None


def read_tag_lists(folder: Path) -> Vocabulary:
    """RAM's vocabulary from a folder with `TAG_LISTS`; the Chinese names may be absent.

    Raises:
        WeightsError: a list is missing or unreadable.
    """
    tags, thresholds, chinese = (folder / name for name in sources.TAG_LISTS)
    missing = [path.name for path in (tags, thresholds) if not path.is_file()]
    if missing:
        raise WeightsError(
            f"{folder} has no {' and no '.join(missing)}: get them with `python -m seesr_core download --what dape`."
        )
    return Vocabulary.from_text_files(tags, thresholds, chinese if chinese.is_file() else None)


def read_ram_with_lists(
    path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, tag_lists: Path
) -> tuple[DAPE, Vocabulary]:
    """What `read_ram` reads, and the vocabulary in the folder `tag_lists`.

    Raises:
        WeightsError: as `read_ram` and `read_tag_lists`, or lists of another model.
    """
    vocabulary, dape = read_tag_lists(tag_lists), read_ram(path, adapter)
    if len(vocabulary) != dape.config.num_tags:
        raise WeightsError(
            f"{tag_lists} has {len(vocabulary)} tags, {path} has {dape.config.num_tags}: use the lists of that model."
        )
    return dape, vocabulary


def read_ram(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> DAPE:
    """The published RAM tagger, or DAPE if its adapter is given, too.

    Args:
        path: `ram_swin_large_14m.pth` (or its Swin-B sister).
        adapter: `DAPE.pth`, or a `dape-lora*.safetensors` of stage 1.
        dtype: of the returned weights.

    Raises:
        WeightsError: another kind of file, RAM and adapter of different sizes, a damaged or unsafe file.
    """
    header = require(path, sources.RAM, Kind.RAM).header
    tensors = load_tensors(path, lambda key: canonical_key(key) is not None)
    state = {canonical_key(key) or key: tensor for key, tensor in tensors.items()}
    if adapter is not None:
        lora, scaling = read_adapter(adapter)
        with one_sentence(adapter, sources.DAPE_LORA):
            state = merge_published_lora(state, lora, scaling=scaling)
    with one_sentence(path, sources.RAM):
        config = DAPEConfig.from_state_dict(state, image_size=_image_size(header))
        return DAPE.from_state_dict(metadata.as_dtype(state, dtype), config)


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], float]:
    """An adapter of the tagger in the layout of `DAPE.pth`, and its scaling alpha / rank.

    Raises:
        WeightsError: another kind of file, or one whose keys or settings make no such adapter.
    """
    found = require(path, sources.DAPE_LORA, Kind.DAPE_LORA, Kind.DAPE_PEFT)
    tensors = load_tensors(path)
    if found.kind is Kind.DAPE_LORA:
        return tensors, SCALING
    with one_sentence(path):
        return peft_lora_to_published(tensors), _peft_scaling(path, found)


def write_adapter(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, source: str = ""
) -> None:
    """Write `dape-lora*.safetensors`: a peft adapter of stage 1, in float32.

    Args:
        path: ends in `.safetensors`.
        tensors: peft's adapter state dict.
        config: peft's adapter config; `r` and `lora_alpha` are read back.
        source: what it was trained on and how.

    Raises:
        ResourceError: the disk is full or cannot be written to.
        SettingsError: weights that are not finite.
    """
    fields = {"config": dict(config), "source": source}
    stored = metadata.cast(tensors, torch.float32)
    metadata.save_safetensors(path, stored, metadata.encode(metadata.DAPE_LORA, fields))


def write_dape(
    path: str | os.PathLike[str],
    dape: DAPE,
    vocabulary: Vocabulary,
    *,
    source: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write `dape*.safetensors`: canonical weights with everything that is needed to use them.

    Args:
        path: ends in `.safetensors`.
        dape: the tagger, adapters merged.
        vocabulary: its tags, one per logit.
        source: what it was made from.
        dtype: float16 or float32.

    Raises:
        SettingsError: a vocabulary of another length, or weights that are not finite in `dtype`.
        ResourceError: the disk is full or cannot be written to.
    """
    if len(vocabulary) != dape.config.num_tags:
        raise SettingsError(
            f"The tagger has {dape.config.num_tags} tags, the vocabulary {len(vocabulary)}: not written."
        )
    fields = dape_metadata(dape, vocabulary, source=source)
    metadata.save_safetensors(path, metadata.cast(dape.state_dict(), dtype), fields)


def dape_metadata(dape: DAPE, vocabulary: Vocabulary, *, source: str = "", **more: Any) -> dict[str, str]:
    """The metadata of a `dape*.safetensors`; `more` are further entries."""
    fields = {
        "config": dape.config.to_dict(),
        **vocabulary.to_metadata(),
        "image_size": dape.config.image_size,
        "source": source,
        **more,
    }
    return metadata.encode(metadata.DAPE, fields)


def read_dape(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> tuple[DAPE, Vocabulary]:
    """Read what `write_dape` wrote; matrices stored in 8 bits (`quantized`) become floats.

    Raises:
        WeightsError: another kind of file, a damaged or newer one, or weights that contradict its own configuration.
    """
    header = require(path, sources.DAPE, Kind.DAPE).header
    metadata.check_version(path, header.metadata, metadata.DAPE)
    config = metadata.field(path, header.metadata, "config", dict)
    with one_sentence(path, sources.DAPE):
        vocabulary = Vocabulary.from_metadata(header.metadata)
        state = metadata.as_dtype(dequantized(load_tensors(path)), dtype)
        dape = DAPE.from_state_dict(state, DAPEConfig.from_dict(config))
    if len(vocabulary) != dape.config.num_tags:
        found = f"it names {len(vocabulary)} tags but its weights have {dape.config.num_tags}"
        raise sources.unfit(path, found, sources.DAPE)
    return dape, vocabulary


def _image_size(header: Header) -> int | None:
    """The input side in pixels, from the number of windows that the first shifted block's mask was computed for."""
    mask = "visual_encoder.layers.0.blocks.1.attn_mask"
    patch = header.side("visual_encoder.patch_embed.proj.weight", 3)
    return math.isqrt(header.side(mask, 0) * header.side(mask, 1)) * patch or None


def _peft_scaling(path: str | os.PathLike[str], found: FileKind) -> float:
    config = metadata.field(path, found.header.metadata, "config", _Adapter, {})
    return config["lora_alpha"] / config.get("r", found.sizes["rank"]) if "lora_alpha" in config else SCALING
