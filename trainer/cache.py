"""What a frozen network made of an input is kept, by the content of the input and the weights of the network."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seesr_core.files import atomic_write

log = logging.getLogger(__name__)


class FrozenCache:
    """Rows of a frozen network's output, in memory and, with a folder, in shards on disk.

    Shards carry the key of the network that made them; those of another are not served. A damaged shard is left out.

    Args:
        key: names the network, its weights and its precision; `fingerprint` makes it.
        folder: where shards are written; None keeps rows in memory only.
        room: bytes kept in memory; the rows used last stay.
        shard_rows: rows collected before a shard is written.
    """

    def __init__(self, key: str, folder: Path | None = None, *, room: int = 1 << 30, shard_rows: int = 512) -> None:
        self.key, self.folder, self.room, self.shard_rows = key, folder, room, shard_rows
        self.rows: OrderedDict[str, Tensor] = OrderedDict()
        self.held = 0
        self.unwritten: dict[str, Tensor] = {}
        self.on_disk: dict[str, Path] = {}
        self.computed = 0
        for path in sorted(folder.glob("*.safetensors")) if folder and folder.is_dir() else ():
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    log.info("%s was made by another network and is not used", path)
                    return
                self.on_disk |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s); its rows are made anew", path, error)

    def get(self, inputs: Sequence[str], compute: Callable[[list[str]], Tensor]) -> Tensor:
        """The output for each input (len(inputs), …), on the CPU; `compute` is asked for those that are not there."""
        names = [hashlib.sha256(text.encode("utf-8")).hexdigest() for text in inputs]
        found = {name: row for name in dict.fromkeys(names) if (row := self._look_up(name)) is not None}
        missing = {name: text for name, text in zip(names, inputs, strict=True) if name not in found}
        if missing:
            made = compute(list(missing.values())).detach().cpu()
            self.computed += len(missing)
            for name, row in zip(missing, made, strict=True):
                found[name] = row.clone()
                self._keep(name, found[name])
                self._collect(name, found[name])
        return torch.stack([found[name] for name in names])

    def _look_up(self, name: str) -> Tensor | None:
        if name in self.rows:
            self.rows.move_to_end(name)
            return self.rows[name]
        if name in self.unwritten:
            return self.unwritten[name]
        if name not in self.on_disk:
            return None
        with safe_open(self.on_disk[name], "pt") as file:
            row: Tensor = file.get_tensor(name)
        self._keep(name, row)
        return row

    def _keep(self, name: str, row: Tensor) -> None:
        self.rows[name] = row
        self.held += row.nbytes
        while self.held > self.room and len(self.rows) > 1:
            self.held -= self.rows.popitem(last=False)[1].nbytes

    def _collect(self, name: str, row: Tensor) -> None:
        if self.folder is None:
            return
        self.unwritten[name] = row
        if len(self.unwritten) >= self.shard_rows:
            self.write()

    def write(self) -> None:
        """Write what is not yet on disk as a shard; its name says what is in it, so that processes do not collide."""
        if self.folder is None or not self.unwritten:
            return
        shard = hashlib.sha256("".join(sorted(self.unwritten)).encode()).hexdigest()[:16]
        path = self.folder / f"{shard}.safetensors"
        with atomic_write(path) as temporary:
            save_file(self.unwritten, temporary, {"key": self.key})
        self.on_disk |= dict.fromkeys(self.unwritten, path)
        self.unwritten = {}
