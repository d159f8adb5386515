"""Writing a `.safetensors` file tensor by tensor, so that no more than one of them need be in memory.

Every file carries in its metadata the sha256 of itself (with zeros in that place), so that damage is told.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import ResourceError, SettingsError
from ..runtime.files import whole_file
from ..runtime.memory import require_disk
from .tensorfile import DIGEST, DTYPE_NAMES

_NO_DIGEST = "0" * 64
_DIGEST_AT = len(f'12345678{{"__metadata__":{{"{DIGEST}":"')
"""Where in a file its digest is: after the header's length, as the first entry."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in a file."""

    shape: tuple[int, ...]
    """The tensor's sizes."""
    dtype: torch.dtype
    """What it is stored in."""

    @property
    def bytes(self) -> int:
        """The tensor's size on disk in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def ordered(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Slots in the order in which they are written: wide types first, so that every tensor is aligned."""
    return dict(sorted(slots.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0])))


def total_bytes(slots: Mapping[str, Slot]) -> int:
    """Bytes of all tensors."""
    return sum(slot.bytes for slot in slots.values())


def write_stream(
    path: Path,
    slots: Mapping[str, Slot],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    *,
    finite: bool = True,
) -> None:
    """Write a file whose tensors arrive one after the other.

    Args:
        path: ends in `.safetensors`; an old file there is replaced once the new one is whole.
        slots: every tensor's place, as `ordered` gives them.
        tensors: the same keys in the same order.
        metadata: text to text.
        finite: whether weights that are not are refused.

    Raises:
        SettingsError: another suffix, or a weight that is not finite in its slot's type.
        ResourceError: the disk has no room or the folder cannot be written to.
        ValueError: other keys or shapes than promised.
    """
    if path.suffix != ".safetensors":
        raise SettingsError(f"{path}: a weights file of this project must end in .safetensors.")
    _require_room(path, total_bytes(slots))
    with whole_file(path) as handle:
        write_into(handle, slots, tensors, metadata, finite=finite)


def write_into(
    handle: BinaryIO,
    slots: Mapping[str, Slot],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    *,
    finite: bool = True,
) -> None:
    """As `write_stream`, into an open file at its beginning; `finite` refuses weights that are not."""
    header, digest, arriving = _header(slots, metadata), hashlib.sha256(), iter(tensors)
    handle.write(header)
    digest.update(header)
    for key, slot in slots.items():
        found, tensor = next(arriving, ("nothing", torch.empty(0)))
        if found != key or tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{key} {slot.shape} was promised, {found} {tuple(tensor.shape)} came")
        content = _bytes(key, tensor, slot, finite=finite)
        handle.write(content)
        digest.update(content)
    handle.seek(_DIGEST_AT)
    handle.write(digest.hexdigest().encode())


def slots_of(tensors: Mapping[str, Tensor]) -> dict[str, Slot]:
    """Slots for tensors as they are, in their order of writing."""
    return ordered({key: Slot(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()})


def _require_room(path: Path, needed: int) -> None:
    folder = path.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"Cannot write into {folder}: {error.strerror or error}. Choose another folder.") from error
    require_disk(folder, needed, f"Writing {path}")


def _header(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {DIGEST: _NO_DIGEST, **metadata}}
    end = 0
    for key, slot in slots.items():
        start, end = end, end + slot.bytes
        entries[key] = {"dtype": DTYPE_NAMES[slot.dtype], "shape": list(slot.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(key: str, tensor: Tensor, slot: Slot, *, finite: bool) -> memoryview:
    """The stored form; a view, so that a large tensor is not copied once more."""
    stored = tensor.detach().cpu().to(slot.dtype).contiguous()
    if finite and stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise SettingsError(f"The weight {key} is not finite as {slot.dtype}; it was not saved. Use --dtype fp32.")
    return stored.reshape(-1).view(torch.uint8).numpy().data
