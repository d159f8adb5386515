"""The published SeeSR folders (U-Net and ControlNet) to one `seesr*.safetensors` with what was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WeightsError
from ..formats.control import CONTROLNET, RCA, UNET, ControlParts, control_metadata, read_published
from ..formats.detect import Kind, require
from ..formats.portions import load_portion, portions
from ..formats.sources import PUBLISHED
from ..formats.stream import Slot, ordered, write_stream
from ..formats.tensorfile import read_header
from .compare import BaseCheck, compare_with_base, unet_file_of

Progress = Callable[[int, int], None]


@dataclass(kw_only=True, slots=True)
class ControlJob:
    """One conversion."""

    folder: Path
    """Published folder with `unet` and `controlnet` inside."""
    target: Path
    """`*.safetensors` to write."""
    base: Path | None = None
    """Base model to compare the frozen weights with; None leaves that out."""
    dtype: torch.dtype = torch.float16
    """Precision of the written weights."""
    progress: Progress = field(default=lambda done, total: None)
    """Called with (done, total) tensors, first while comparing, then while writing."""

    def run(self) -> BaseCheck | None:
        """Compare and write; returns the comparison.

        Raises:
            WeightsError: a file is missing, damaged or another, or its U-Net is not the base's.
            ResourceError: the disk has no room. SettingsError: weights that are not finite in `dtype`.
        """
        parts = read_published(self.folder)
        files = self.files()
        check = self._compare(files["unet"], parts)
        entries = _entries(files)
        slots = ordered({key: Slot(shape, self.dtype) for key, (_, _, shape) in entries.items()})
        fields = control_metadata(parts, base_check=str(check) if check else "not compared")
        del parts
        write_stream(self.target, slots, self._tensors(slots, entries), fields)
        return check

    def files(self) -> dict[str, Path]:
        """The two weights files.

        Raises:
            WeightsError: one is missing or another kind of file.
        """
        found = {}
        for name, kind in (("unet", Kind.SEESR_UNET), ("controlnet", Kind.SEESR_CONTROLNET)):
            path = unet_file_of(self.folder / name)
            if path is None:
                raise WeightsError(f"{self.folder / name} has no weights: expected {PUBLISHED.name}.")
            found[name] = require(path, PUBLISHED, kind).header.path
        return found

    def _compare(self, unet_file: Path, parts: ControlParts) -> BaseCheck | None:
        if self.base is None:
            return None
        check = compare_with_base(unet_file, parts.unet_config, self.base, self.progress)
        if not check.same_model:
            raise WeightsError(
                f"The U-Net of {self.folder} {check}: it was trained on another base. Name that one with --base, or "
                "convert without the comparison (--unchecked)."
            )
        return check

    def _tensors(self, slots: Iterable[str], entries: dict[str, _Entry]) -> Iterator[tuple[str, Tensor]]:
        """The weights in the order of `slots`, a portion at a time."""
        total, done = len(entries), 0
        for path, names in _by_file(slots, entries):
            header = read_header(path)
            own = {entries[name][1]: name for name in names}
            for keys in portions(header, own):
                loaded = load_portion(path, keys)
                for key in keys:
                    yield own[key], loaded.pop(key)
                done += len(keys)
                self.progress(done, total)


_Entry = tuple[Path, str, tuple[int, ...]]
"""A weight's file, its key there, and its shape."""


def _entries(files: dict[str, Path]) -> dict[str, _Entry]:
    """What is kept, by its name in our file: the whole ControlNet, and of the U-Net its RCA."""
    found: dict[str, _Entry] = {}
    for part, prefix in (("controlnet", CONTROLNET), ("unet", UNET)):
        for key, spec in read_header(files[part]).tensors.items():
            if part == "controlnet" or RCA in key:
                found[f"{prefix}{key}"] = (files[part], key, spec.shape)
    return found


def _by_file(slots: Iterable[str], entries: dict[str, _Entry]) -> Iterator[tuple[Path, list[str]]]:
    """Runs of neighbours that lie in one file."""
    run: list[str] = []
    for name in slots:
        if run and entries[name][0] != entries[run[0]][0]:
            yield entries[run[0]][0], run
            run = []
        run.append(name)
    if run:
        yield entries[run[0]][0], run
