"""What a frozen network made of an input is kept, by the content of the input and the weights of the network."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from seesr_core.errors import ResourceError, WeightsError
from seesr_core.formats.metadata import save_safetensors
from seesr_core.formats.tensorfile import is_undamaged, read_header

from ..engine.loop_config import LoopConfig
from .fingerprints import fingerprint

log = logging.getLogger(__name__)

Row: TypeAlias = tuple[Tensor, ...]


class FrozenCache:
    """Rows of a frozen network's output, in memory and, with a folder, in shards on disk.

    Shards carry the key of the network that made them; those of another are not served. A damaged shard is left out.
    If the disk is full, rows are kept in memory only.

    Args:
        key: names the network, its weights and its arithmetic; `network_key` makes it.
        folder: where shards are written; None keeps rows in memory only.
        parts: tensors in a row.
        room: bytes kept in memory; the rows used last stay.
        shard_bytes: bytes collected before a shard is written.
    """

    def __init__(
        self,
        key: str,
        folder: Path | None = None,
        *,
        parts: int = 1,
        room: int = 1 << 30,
        shard_bytes: int = 64 << 20,
    ) -> None:
        self.key, self.folder, self.parts, self.room, self.shard_bytes = key, folder, parts, room, shard_bytes
        self.rows: OrderedDict[str, Row] = OrderedDict()
        self.held = 0
        self.unwritten: dict[str, Row] = {}
        self.on_disk: dict[str, Path] = {}
        self.computed = 0
        for path in sorted(folder.glob("*.safetensors")) if folder and folder.is_dir() else ():
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            header = read_header(path)
            if header.metadata.get("key") != self.key:
                log.info("%s was made by another network and is not used", path)
                return
            if is_undamaged(header) is False:
                raise WeightsError("some of its bytes have changed")
            last = f".{self.parts - 1}"
            names = (name.removesuffix(last) for name in header.tensors if name.endswith(last))
            self.on_disk |= dict.fromkeys(names, path)
        except (WeightsError, OSError) as error:
            log.warning("%s is damaged (%s); its rows are made anew", path, error)

    def get(self, inputs: Sequence[str], compute: Callable[[list[str]], Tensor]) -> Tensor:
        """The output for each text (len(inputs), …), on the CPU; `compute` is asked for those that are not there."""
        names = [hashlib.sha256(text.encode("utf-8")).hexdigest() for text in inputs]
        found = {name: row for name in dict.fromkeys(names) if (row := self._look_up(name)) is not None}
        missing = {name: text for name, text in zip(names, inputs, strict=True) if name not in found}
        if missing:
            found |= self._add(list(missing), (compute(list(missing.values())),))
        return torch.stack([found[name][0] for name in names])

    def batch(self, images: Sequence[Tensor], compute: Callable[[], Row]) -> Row:
        """What `compute` gives for a batch, tensors (B, …) on any device; not asked for if every row is there.

        If one is missing the whole batch is made, so that networks always look at as many images as without a cache and
        a batch that returns as it was has the same bits.

        Args:
            images: tensors (B, …); the n-th entries of all of them name row n by their content.
            compute: gives `parts` tensors.
        """
        names = contents(images)
        rows = [self._look_up(name) for name in names]
        found = [row for row in rows if row is not None]
        if len(found) == len(rows):
            return tuple(torch.stack(column) for column in zip(*found, strict=True))
        made = compute()
        self._add(names, made)
        return made

    def _add(self, names: Sequence[str], made: Row) -> dict[str, Row]:
        """Keep rows by their names; those that are there already stay as they are."""
        columns = [part.detach().cpu() for part in made]
        rows = {
            name: tuple(part.clone(memory_format=torch.contiguous_format) for part in row)
            for name, *row in zip(names, *columns, strict=True)
        }
        new = {name: row for name, row in rows.items() if self._look_up(name) is None}
        self.computed += len(new)
        for name, row in new.items():
            self._keep(name, row)
            self._collect(name, row)
        return rows

    def _look_up(self, name: str) -> Row | None:
        if name in self.rows:
            self.rows.move_to_end(name)
            return self.rows[name]
        if name in self.unwritten:
            return self.unwritten[name]
        if name not in self.on_disk:
            return None
        try:
            with safe_open(self.on_disk[name], "pt") as file:
                row = tuple(file.get_tensor(f"{name}.{part}") for part in range(self.parts))
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s is damaged (%s); its rows are made anew", self.on_disk.pop(name), error)
            return None
        self._keep(name, row)
        return row

    def _keep(self, name: str, row: Row) -> None:
        self.rows[name] = row
        self.held += _bytes(row)
        while self.held > self.room and len(self.rows) > 1:
            self.held -= _bytes(self.rows.popitem(last=False)[1])

    def _collect(self, name: str, row: Row) -> None:
        if self.folder is None:
            return
        self.unwritten[name] = row
        if sum(map(_bytes, self.unwritten.values())) >= self.shard_bytes:
            self.write()

    def write(self) -> None:
        """Write what is not yet on disk as a shard; its name says what is in it, so that processes do not collide."""
        if self.folder is None or not self.unwritten:
            return
        shard = hashlib.sha256("".join([self.key, *sorted(self.unwritten)]).encode()).hexdigest()[:16]
        path = self.folder / f"{shard}.safetensors"
        tensors = {f"{name}.{part}": t for name, row in self.unwritten.items() for part, t in enumerate(row)}
        try:
            save_safetensors(path, tensors, {"key": self.key}, finite=False)
        except ResourceError as error:
            log.warning("%s cannot be written (%s); what networks made is kept in memory only", path, error)
            self.folder = None
        else:
            self.on_disk |= dict.fromkeys(self.unwritten, path)
        self.unwritten = {}


def network_key(loop: LoopConfig, *networks: nn.Module) -> str:
    """Names networks by their weights, and how a run computes with them."""
    compiled = loop.compile in ("frozen", "all")
    how = (loop.resolve_precision(), loop.tf32, compiled, loop.resolve_device().type)
    return " ".join([*map(fingerprint, networks), *map(str, how)])


def contents(images: Sequence[Tensor]) -> list[str]:
    """A name for every entry of a batch (B, …) by what is in it, in one tensor or several."""
    batch = [image.detach().cpu().contiguous() for image in images]
    return [_content(entries) for entries in zip(*batch, strict=True)]


def _content(entries: Iterable[Tensor]) -> str:
    total = hashlib.sha256()
    for entry in entries:
        total.update(f"{entry.dtype} {tuple(entry.shape)}".encode())
        total.update(entry.numpy().tobytes())
    return total.hexdigest()


def _bytes(row: Row) -> int:
    return sum(part.nbytes for part in row)
