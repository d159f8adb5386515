"""Reading a large file in portions, each from a mapping of its own, so that memory holds one portion at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from .tensorfile import Header, load_tensors

PORTION = 256 << 20
"""Bytes of a portion; a single larger tensor is one by itself."""


def portions(header: Header, keys: Iterable[str], limit: int = PORTION) -> Iterator[list[str]]:
    """`keys` of a file, in their order, cut into runs of at most `limit` bytes."""
    run: list[str] = []
    size = 0
    for key in keys:
        more = header.tensors[key].bytes
        if run and size + more > limit:
            yield run
            run, size = [], 0
        run.append(key)
        size += more
    if run:
        yield run


def load_portion(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors `keys`, memory-mapped; the mapping goes when they do."""
    wanted = set(keys)
    return load_tensors(path, wanted.__contains__)
