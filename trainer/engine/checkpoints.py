"""Checkpoints of a run: written aside and renamed, the newest whole one found again, the older ones thinned out.

`checkpoint.safetensors` is the newest; `checkpoints/` has those before it, by step, and `best.safetensors`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from safetensors import safe_open
from torch import Tensor

from seesr_core.errors import DataError, WeightsError
from seesr_core.formats.schema import Whole, parse_json, read, read_json
from seesr_core.formats.stream import slots_of, write_into
from seesr_core.formats.tensorfile import DTYPES, Header, is_undamaged, read_header
from seesr_core.runtime.files import atomic_write, whole_file, write_text

log = logging.getLogger(__name__)

NEWEST = "checkpoint.safetensors"
OLDER = "checkpoints"
BEST = "best.safetensors"
JUDGED = "val_loss"
_DIGITS = 8


@dataclass(slots=True)
class Saved:
    """A checkpoint that is whole."""

    path: Path
    """Path of the checkpoint."""
    step: int
    """Optimizer steps done."""
    facts: dict[str, Any]
    """Settings of the run that wrote it."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of its tensors, by name."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What else the loop has to know."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that `State.tensors` gives, read one by one."""
        with safe_open(self.path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)


@dataclass(slots=True)
class Checkpoints:
    """The checkpoints in a run folder."""

    folder: Path
    """Run folder."""
    keep_last: int = 2
    """Number of checkpoints to keep, the newest included."""

    def save(
        self, tensors: Mapping[str, Tensor], step: int, facts: Mapping[str, Any], notes: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint; at no moment is there none that is whole.

        Raises:
            ResourceError: the disk is full; the checkpoints are as they were.
        """
        newest = self.folder / NEWEST
        metadata = {"format": "seesr-training", "step": str(step), "facts": json.dumps(facts)}
        metadata["notes"] = json.dumps(dict(notes))
        slots = slots_of(tensors)
        with whole_file(newest) as handle:
            write_into(handle, slots, ((name, tensors[name]) for name in slots), metadata, finite=False)
            handle.flush()
            os.fsync(handle.fileno())
            self._put_aside(newest)
        self._thin_out()

    def _put_aside(self, newest: Path) -> None:
        if self.keep_last > 1 and newest.exists():
            step = _step_of(newest)
            if step is not None:
                (self.folder / OLDER).mkdir(exist_ok=True)
                os.replace(newest, self.folder / OLDER / f"{step:0{_DIGITS}d}.safetensors")

    def _thin_out(self) -> None:
        for path in self._older()[max(self.keep_last - 1, 0) :]:
            path.unlink()

    def _older(self) -> list[Path]:
        return sorted((self.folder / OLDER).glob("[0-9]" * _DIGITS + ".safetensors"), reverse=True)

    def is_best(self, figures: Mapping[str, float], step: int) -> bool:
        """Whether a validation at `step` was better than all before it."""
        if JUDGED not in figures:
            return False
        try:
            best = read(dict[str, float], read_json((self.folder / OLDER / BEST).with_suffix(".json")))
            return bool(best["step"] >= step or figures[JUDGED] < best[JUDGED])
        except (OSError, ValueError, KeyError):
            return True

    def mark_best(self, figures: Mapping[str, float], step: int) -> None:
        """Keep the newest checkpoint as the best one; where the file system can, without using room twice."""
        best = self.folder / OLDER / BEST
        with atomic_write(best) as temporary:
            temporary.unlink()
            try:
                os.link(self.folder / NEWEST, temporary)
            except OSError:
                shutil.copyfile(self.folder / NEWEST, temporary)
        write_text(best.with_suffix(".json"), json.dumps({"step": step, **figures}))

    def newest_whole(self) -> Saved | None:
        """The newest checkpoint that can be read, or None if there never was one; damaged ones are logged.

        Raises:
            DataError: there are checkpoints, but none is whole.
        """
        damaged = []
        for path in self._candidates():
            try:
                return _read(path)
            except (WeightsError, OSError, ValueError) as error:
                log.warning("skipped the damaged checkpoint %s (%s)", path, error)
                damaged.append(path.name)
        if damaged:
            raise DataError(
                f"No checkpoint in {self.folder} is whole ({', '.join(damaged)}); remove them to begin anew, "
                "or restore one from a copy."
            )
        return None

    def _candidates(self) -> Iterator[Path]:
        """Files that may be checkpoints, from the newest to the oldest."""
        if (self.folder / NEWEST).exists():
            yield self.folder / NEWEST
        yield from self._older()


class _Metadata(TypedDict):
    """What a checkpoint says of itself."""

    step: Whole
    facts: dict[str, Any]
    notes: dict[str, Any]


def _read(path: Path) -> Saved:
    """The header is checked against the file's length, and all of it against the hash that it carries.

    Raises:
        WeightsError, ValueError, OSError: it is damaged.
    """
    header = read_header(path)
    found = _metadata(header)
    if is_undamaged(header) is False:
        raise ValueError("its content is not what was written: some of its bytes have changed")
    strange = sorted({spec.dtype for spec in header.tensors.values()} - DTYPES.keys())
    if strange:
        raise ValueError(f"its tensors are of the unknown type {strange[0]!r}")
    shapes = {name: spec.shape for name, spec in header.tensors.items()}
    return Saved(path=path, shapes=shapes, **found)


def _metadata(header: Header) -> _Metadata:
    entries = {name: header.metadata.get(name, "{}") for name in ("step", "facts", "notes")}
    found: _Metadata = read(_Metadata, {name: parse_json(text) for name, text in entries.items()}, "its metadata")
    return found


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint, None if it is damaged."""
    try:
        return _metadata(read_header(path))["step"]
    except (WeightsError, OSError, ValueError):
        return None
