"""Reading a large file in portions, each from a mapping of its own, so that memory holds one portion at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from .tensorfile import Header, load_tensors

PORTION = 256 << 20
"""Bytes of a portion; a single larger tensor is one by itself."""
_WIDTH = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def portions(header: Header, keys: Iterable[str], limit: int = PORTION) -> Iterator[list[str]]:
    """`keys` of a file, in their order, cut into runs of at most `limit` bytes."""
    run: list[str] = []
    size = 0
    for key in keys:
        more = bytes_of(header, key)
        if run and size + more > limit:
            yield run
            run, size = [], 0
        run.append(key)
        size += more
    if run:
        yield run


def bytes_of(header: Header, key: str) -> int:
    """Size of a tensor in the file."""
    spec = header.tensors[key]
    return math.prod(spec.shape) * _WIDTH.get(spec.dtype, 1)


def load_portion(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors `keys`, memory-mapped; the mapping goes when they do."""
    wanted = set(keys)
    return load_tensors(path, wanted.__contains__)
