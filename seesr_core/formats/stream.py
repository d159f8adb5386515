"""Writing a `.safetensors` file tensor by tensor, so that no more than one of them need be in memory.

On Linux the file has no name until it is whole: whoever kills the process, nothing half-written is left behind.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import ResourceError, SettingsError
from ..runtime.files import atomic_write
from ..runtime.memory import require_disk

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor's place in a file."""

    shape: tuple[int, ...]
    """The tensor's sizes."""
    dtype: torch.dtype
    """What it is stored in: float32, float16 or int8."""

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
    path: Path, slots: Mapping[str, Slot], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a file whose tensors arrive one after the other.

    Args:
        path: ends in `.safetensors`; an old file there is replaced once the new one is whole.
        slots: every tensor's place, as `ordered` gives them.
        tensors: the same keys in the same order.
        metadata: text to text.

    Raises:
        SettingsError: another suffix, or a weight that is not finite in its slot's type.
        ResourceError: the disk has no room or the folder cannot be written to.
        ValueError: other keys or shapes than promised.
    """
    if path.suffix != ".safetensors":
        raise SettingsError(f"{path}: a weights file of this project must end in .safetensors.")
    _require_room(path, total_bytes(slots))
    with _nameless(path) as handle:
        handle.write(_header(slots, metadata))
        arriving = iter(tensors)
        for key, slot in slots.items():
            found, tensor = next(arriving, ("nothing", torch.empty(0)))
            if found != key or tuple(tensor.shape) != slot.shape:
                raise ValueError(f"{key} {slot.shape} was promised, {found} {tuple(tensor.shape)} came")
            handle.write(_bytes(key, tensor, slot))


def _require_room(path: Path, needed: int) -> None:
    folder = path.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"Cannot write into {folder}: {error.strerror or error}. Choose another folder.") from error
    require_disk(folder, needed, f"Writing {path}")


def _header(slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, slot in slots.items():
        start, end = end, end + slot.bytes
        entries[key] = {"dtype": _NAMES[slot.dtype], "shape": list(slot.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(key: str, tensor: Tensor, slot: Slot) -> memoryview:
    """The stored form; a view, so that a large tensor is not copied once more."""
    stored = tensor.detach().to(slot.dtype).contiguous()
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise SettingsError(f"The weight {key} is not finite as {slot.dtype}; it was not saved. Use --dtype fp32.")
    return stored.reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def _nameless(path: Path) -> Iterator[BinaryIO]:
    """A file that appears as `path` when the block ends, and not at all if it does not."""
    with contextlib.ExitStack() as stack:
        handle = _open_nameless(path.parent)
        if handle is None:
            temporary = stack.enter_context(atomic_write(path))
            yield stack.enter_context(temporary.open("wb"))
            return
        stack.enter_context(handle)
        stack.enter_context(_one_sentence(path))
        yield handle
        handle.flush()
        _name(handle, path)


def _open_nameless(folder: Path) -> BinaryIO | None:
    """An unnamed file in `folder`; None where the system has no such thing, or cannot name it afterwards."""
    try:
        with _unnamed(folder) as probe:
            _link(probe, folder / f".{uuid.uuid4().hex}").unlink()
        return _unnamed(folder)
    # No O_TMPFILE (not Linux), no links to open files, or a file system without either.
    except (AttributeError, NotImplementedError, OSError):
        return None  # atomic_write says what is wrong with the folder, if anything is


def _unnamed(folder: Path) -> BinaryIO:
    return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "wb")


def _name(handle: BinaryIO, path: Path) -> None:
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        os.replace(_link(handle, temporary), path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(handle: BinaryIO, path: Path) -> Path:
    """Give an unnamed file a name. Only with a folder's descriptor does Python ask for the link behind /proc."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{handle.fileno()}", path.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)
    return path


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"Could not write {path}: {error.strerror or error}. Nothing was changed there.") from error
