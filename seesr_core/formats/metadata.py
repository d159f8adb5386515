"""The JSON metadata in our `.safetensors` files, and how such a file is written.

Every file of ours carries `format` and `version`; plain text stays as it is, all other values are JSON. A reader takes
every version up to its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError, WeightsError
from .schema import MalformedError, parse_json, read
from .stream import slots_of, write_stream

BASE = "seesr-base"
DAPE = "seesr-dape"
DAPE_LORA = "seesr-dape-lora"
CONTROL = "seesr-control"
SEGSR = "seesr-segsr"

VERSIONS: Mapping[str, int] = {BASE: 1, DAPE: 1, DAPE_LORA: 1, CONTROL: 1, SEGSR: 1}
"""The newest version of each format that this code writes and reads."""

DTYPES = (torch.float16, torch.float32)
"""What our files may be stored in: half precision to ship, single precision to compare."""


def encode(kind: str, fields: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a file of format `kind`: text stays text, everything else becomes JSON."""
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in fields.items()
    }
    return {"format": kind, "version": str(VERSIONS[kind]), **texts}


def field(
    path: str | os.PathLike[str], metadata: Mapping[str, str], name: str, kind: Any = Any, default: Any = ...
) -> Any:
    """The JSON value of `name` as `kind` (see `schema`); `default` if it is absent.

    Raises:
        WeightsError: the field is absent and has no default, or is not JSON of that kind.
    """
    if name not in metadata:
        if default is ...:
            raise WeightsError(
                f"{path} has no metadata field {name!r}; the file is damaged or was re-saved by another program."
            )
        return default
    try:
        return read(kind, parse_json(metadata[name]))
    except MalformedError as error:
        raise WeightsError(f"{path}: the metadata field {name!r} cannot be used: {error}.") from error


def check_version(path: str | os.PathLike[str], metadata: Mapping[str, str], kind: str) -> int:
    """The file's version.

    Raises:
        WeightsError: it was written by a newer release, or states no whole number.
    """
    text = metadata.get("version", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise WeightsError(f"{path}: the metadata field 'version' should be a whole number, found {text[:60]!r}.")
    if int(text) > VERSIONS[kind]:
        raise WeightsError(
            f"{path} is a {kind} file of version {text}; this release reads up to {VERSIONS[kind]}. Update the project."
        )
    return int(text)


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, finite: bool = True
) -> None:
    """Write a `.safetensors` file, whole or not at all.

    Args:
        path: ends in `.safetensors`.
        tensors: any devices and strides; stored contiguous, sharing undone.
        metadata: text to text.
        finite: whether weights that are not are refused.

    Raises:
        ResourceError: the folder cannot be written to or the disk is full.
        SettingsError: `path` has another suffix, or a weight is not finite.
    """
    slots = slots_of(tensors)
    write_stream(Path(path), slots, ((key, tensors[key]) for key in slots), metadata, finite=finite)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every floating tensor in `dtype`; whole numbers as they are.

    Raises:
        SettingsError: our files are stored in float16 or float32 only, or a weight is not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"Weights are stored as float16 or float32, not as {dtype}.")
    result = {key: t.detach().to(dtype) if t.is_floating_point() else t.detach() for key, t in tensors.items()}
    broken = next(
        (key for key, t in result.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())), None
    )
    if broken is not None:
        raise SettingsError(
            f"The weight {broken} is not finite as {dtype}; it was not saved. Check the training or use float32."
        )
    return result


def as_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every floating tensor in `dtype` (untouched, and still memory-mapped, if it has it already)."""
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
