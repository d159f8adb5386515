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
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seesr_core.errors import DataError, ResourceError
from seesr_core.runtime.files import atomic_write

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
        with atomic_write(newest) as temporary:
            _write(dict(tensors), temporary, metadata, newest)
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
            best = json.loads((self.folder / OLDER / BEST).with_suffix(".json").read_text("utf-8"))
        except (OSError, ValueError):
            return True
        return bool(best["step"] >= step or figures[JUDGED] < best[JUDGED])

    def mark_best(self, figures: Mapping[str, float], step: int) -> None:
        """Keep the newest checkpoint as the best one; where the file system can, without using room twice."""
        best = self.folder / OLDER / BEST
        with atomic_write(best) as temporary:
            temporary.unlink()
            try:
                os.link(self.folder / NEWEST, temporary)
            except OSError:
                shutil.copyfile(self.folder / NEWEST, temporary)
        with atomic_write(best.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps({"step": step, **figures}), "utf-8")

    def newest_whole(self) -> Saved | None:
        """The newest checkpoint that can be read, or None if there never was one; damaged ones are logged.

        Raises:
            DataError: there are checkpoints, but none is whole.
        """
        damaged = []
        for path in self._candidates():
            try:
                return _read(path)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
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


def _write(tensors: dict[str, Tensor], temporary: Path, metadata: dict[str, str], target: Path) -> None:
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise ResourceError(
            f"Could not write {target} ({error}). Nothing was lost: free some room and give the same command again."
        ) from error
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())


def _read(path: Path) -> Saved:
    """Opening checks that the file is as long as its header says."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return Saved(
        path=path,
        step=int(metadata["step"]),
        facts=json.loads(metadata["facts"]),
        notes=json.loads(metadata.get("notes", "{}")),
    )


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint, None if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return int((file.metadata() or {})["step"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
