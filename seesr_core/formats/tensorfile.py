"""One view of a weights file, whatever its container: names, shapes and dtypes first, tensors on demand.

The container is told by the first bytes, never by the file's name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import WeightsError
from .pickles import open_pickle

_MAX_HEADER = 100_000_000
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
    with safe_open(str(path), framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in header.tensors if keep(key)}


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
        with open(path, "rb") as handle:
            return handle.read(64), os.path.getsize(path)
    except OSError as error:
        raise WeightsError(f"Cannot open the weights file {path}: {error.strerror or error}.") from error


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
        entries: dict[str, Any] = json.loads(text)
        metadata = entries.pop("__metadata__", None) or {}
        specs = {key: TensorSpec(tuple(entry["shape"]), str(entry["dtype"])) for key, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(f"{path} is damaged: its safetensors header cannot be read. Download it again.") from error
    if size != 8 + length + end:
        raise WeightsError(
            f"{path} is truncated or damaged: expected {8 + length + end:,} bytes, found {size:,}. Download it again."
        )
    return Header(path=path, container="safetensors", tensors=specs, metadata=metadata)


def _dtype_name(tensor: Tensor) -> str:
    """safetensors' name of a torch dtype: float16 → F16, bfloat16 → BF16, int64 → I64."""
    name = str(tensor.dtype).removeprefix("torch.")
    for long, short in (("bfloat", "BF"), ("float", "F"), ("uint", "U"), ("int", "I"), ("bool", "BOOL")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name.upper()
