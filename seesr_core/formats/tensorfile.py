"""One view of a weights file, whatever its container: names, shapes and dtypes first, tensors on demand.

The container is told by the first bytes, never by the file's name.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ..errors import WeightsError
from .border import one_sentence
from .pickles import open_pickle
from .schema import MalformedError, Whole, Within, parse_json, read

DIGEST = "sha256"
"""Metadata entry: the hash of the file, itself taken for zeros."""
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By safetensors' names."""
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""The inverse."""
_MAX_HEADER = 1 << 25
"""Bytes; the largest headers known have some hundred thousand."""
_BLOCK = 1 << 22
_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"GIF8", "a GIF picture"),
    (b"RIFF", "a RIFF file (WebP, sound or film)"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves"),
    (b"<", "a web page or XML (the download brought the page instead of the file)"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive"),
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a header says about one tensor."""

    shape: tuple[int, ...]
    """The tensor's sizes."""
    dtype: str
    """The element type as safetensors names it: F32, F16, BF16, I64, U8 …"""

    @property
    def bytes(self) -> int:
        """Its size in the file; of types that are not in `DTYPES` the number of its elements."""
        return math.prod(self.shape) * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A weights file without its numbers."""

    path: Path
    """Path of the file."""
    container: str
    """`safetensors` or `pickle`."""
    tensors: Mapping[str, TensorSpec]
    """Every tensor by key."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """safetensors metadata; empty for pickles."""

    def shape(self, key: str) -> tuple[int, ...] | None:
        """The sizes of `key`, or None if the file lacks it."""
        spec = self.tensors.get(key)
        return spec.shape if spec else None

    def side(self, key: str, axis: int, rank: int | None = None) -> int:
        """One size of `key`; 0 if the file lacks it, or if it has no such axis (or not `rank` of them)."""
        shape = self.shape(key) or ()
        return shape[axis] if axis < len(shape) and rank in (None, len(shape)) else 0

    def find(self, *parts: str) -> str | None:
        """The first key that contains all of `parts`."""
        return next((key for key in self.tensors if all(part in key for part in parts)), None)

    def parameters(self) -> int:
        """How many numbers the file holds."""
        return sum(math.prod(spec.shape) for spec in self.tensors.values())

    def dtype(self) -> str:
        """The element type of most numbers."""
        counts: dict[str, int] = {}
        for spec in self.tensors.values():
            counts[spec.dtype] = counts.get(spec.dtype, 0) + math.prod(spec.shape)
        return max(counts, key=counts.__getitem__) if counts else "none"


def read_header(path: str | os.PathLike[str]) -> Header:
    """Names, shapes, dtypes and metadata, without reading the weights (a pickle is memory-mapped).

    Raises:
        WeightsError: missing, empty, truncated, unsafe, or no weights file at all; one sentence says which.
    """
    if _is_safetensors(path):
        return _safetensors_header(Path(path))
    specs = {key: TensorSpec(tuple(t.shape), _dtype_name(t)) for key, t in open_pickle(path).items()}
    return Header(path=Path(path), container="pickle", tensors=specs)


def load_tensors(path: str | os.PathLike[str], keep: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """The tensors whose keys `keep` accepts, on the CPU, in the file's dtypes, memory-mapped.

    Raises:
        WeightsError: as `read_header`.
    """
    if not _is_safetensors(path):
        return {key: tensor for key, tensor in open_pickle(path).items() if keep(key)}
    from safetensors import safe_open

    header = _safetensors_header(Path(path))
    with one_sentence(path), safe_open(str(path), framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in header.tensors if keep(key)}


def is_undamaged(header: Header) -> bool | None:
    """Whether a file has the hash that it carries, which reads all of it; None if it carries none.

    Raises:
        OSError: it cannot be read.
    """
    stated = header.metadata.get(DIGEST, "")
    if header.container != "safetensors" or len(stated) != 64:
        return None
    digest = hashlib.sha256()
    with header.path.open("rb") as handle:
        start = handle.read(8)
        text = handle.read(int.from_bytes(start, "little"))
        digest.update(start + text.replace(stated.encode(), b"0" * 64, 1))
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest() == stated


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """True for a safetensors file, False for what may be a pickle; everything else is refused here."""
    start, size = _first_bytes(path)
    if size == 0:
        raise WeightsError(f"{path} is empty (0 bytes): expected a weights file. Download it again.")
    if start[8:9] == b"{":  # asked first: a header's length may begin with any byte
        return True
    if start[:1] == b"\x80" or start[:2] == b"PK":
        return False
    found = next((name for magic, name in _MAGICS if start.startswith(magic)), None)
    if found:
        raise WeightsError(f"{path} is {found}: expected a weights file (.safetensors, .pth or .bin).")
    raise WeightsError(
        f"{path} is no weights file or is damaged: it begins like neither .safetensors nor a torch file."
    )


def _first_bytes(path: str | os.PathLike[str]) -> tuple[bytes, int]:
    try:
        found = os.stat(path)  # asked first: opening a pipe waits for its other end
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise WeightsError(f"{path} is a pipe or a device: expected a weights file.")
        with open(path, "rb") as handle:
            return handle.read(64), found.st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"Cannot open the weights file {path}: {reason}.") from error


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[Annotated[int, Within(0, 1 << 40)], ...]
    data_offsets: tuple[Whole, Whole]


def _safetensors_header(path: Path) -> Header:
    """Parsed here rather than by the library, so that a truncated file is told by its own header's arithmetic."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise WeightsError(
                f"{path} is truncated or damaged: its header should be {length:,} bytes, the file has {size:,}."
            )
        text = handle.read(length)
    try:
        entries = read(dict[str, Any], parse_json(text), "its header")
        metadata = read(dict[str, str] | None, entries.pop("__metadata__", None), "its metadata") or {}
        slots = read(dict[str, _Entry], entries, "its header")
    except MalformedError as error:
        raise WeightsError(
            f"{path} is damaged: its safetensors header cannot be read ({error}). Download it again."
        ) from error
    specs = {key: TensorSpec(slot.shape, slot.dtype) for key, slot in slots.items()}
    end = _end(path, specs, slots)
    if size != 8 + length + end:
        raise WeightsError(
            f"{path} is truncated or damaged: expected {8 + length + end:,} bytes, found {size:,}. Download it again."
        )
    return Header(path=path, container="safetensors", tensors=specs, metadata=metadata)


def _end(path: Path, specs: Mapping[str, TensorSpec], slots: Mapping[str, _Entry]) -> int:
    """Where the last tensor ends; each must be as long as its shape says and begin where the one before ends."""
    end = 0
    for key, slot in sorted(slots.items(), key=lambda entry: entry[1].data_offsets):
        start, stop = slot.data_offsets
        known = slot.dtype in DTYPES
        if start != end or stop < start or (known and stop - start != specs[key].bytes):
            raise WeightsError(
                f"{path} is damaged: its header gives {key[:60]!r} of shape {slot.shape} the bytes {start:,} to "
                f"{stop:,}. Download it again."
            )
        end = stop
    return end


def _dtype_name(tensor: Tensor) -> str:
    """safetensors' name of a torch dtype: float16 → F16, bfloat16 → BF16, int64 → I64."""
    return DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.").upper())
