"""Computing every figure of every picture once: in batches, in several processes, going on where it was interrupted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError
from seesr_core.install.hashing import sha256
from seesr_core.pictures.reading import InputPhoto, read_photo

from ...data.fingerprints import digest
from ..pictures import as_picture, as_tensor, enlarge
from .builds import Builds
from .metrics import BY_KEY, Facts, Outcome
from .protocols import ProtocolName, under
from .state import Known, key_of

SR, HR, BICUBIC = "SR", "HR", "bicubic"
Kind = Literal["sr", "hr", "lr"]
Rows = dict[str, dict[str, dict[str, Outcome]]]
"""Outcomes by row, picture and metric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """The files of one picture."""

    name: str
    """Name of the picture without suffix."""
    sr: Path
    """File of the result."""
    hr: Path | None = None
    """File of the original."""
    lr: Path | None = None
    """File of the photo that was upscaled."""

    @property
    def files(self) -> dict[Kind, Path]:
        """The files of the picture that are there."""
        given: dict[Kind, Path | None] = {"sr": self.sr, "hr": self.hr, "lr": self.lr}
        return {kind: path for kind, path in given.items() if path is not None}

    @property
    def rows(self) -> list[str]:
        """Bicubic, result and original, as far as they are there, in this order."""
        return [*([BICUBIC] if self.lr else []), SR, *([HR] if self.hr else [])]

    def load(self, protocol: ProtocolName) -> Loaded:
        """Read and cut to what the protocol measures.

        Raises:
            SeeSRError: a file cannot be read, sizes differ, or they do not fit the protocol.
        """
        photos = {kind: read_photo(path) for kind, path in self.files.items()}
        try:
            parts = {kind: under(protocol, kind, as_tensor(photo.rgb)) for kind, photo in photos.items()}
            _check_sizes(parts)
        except DataError as error:
            raise DataError(f"{self.sr}: {error}") from error
        pictures = {SR: parts["sr"]}
        if "lr" in parts:
            pictures[BICUBIC] = as_tensor(enlarge(as_picture(parts["lr"]), parts["sr"]))
        if "hr" in parts:
            pictures[HR] = parts["hr"]
        return Loaded(
            pictures={row: pictures[row] for row in self.rows},
            lr=as_picture(parts["lr"]) if "lr" in parts else None,
            notes="; ".join(_notes(photos)),
        )


@dataclass(kw_only=True, slots=True)
class Loaded:
    """The pixels of one case."""

    pictures: dict[str, Tensor]
    """Pictures by row, uint8 (3, H, W) of one size."""
    lr: Image.Image | None
    """The photo that was upscaled."""
    notes: str
    """What reading the files had to change."""


def _check_sizes(parts: Mapping[Kind, Tensor]) -> None:
    if "hr" not in parts or parts["hr"].shape == parts["sr"].shape:
        return
    (h, w), (oh, ow) = parts["sr"].shape[1:], parts["hr"].shape[1:]
    raise DataError(
        f"it has {w}×{h} pixels, its original {ow}×{oh}; only pictures of one size can be compared. "
        "Upscale to the original's size, or leave --hr out."
    )


def _notes(photos: Mapping[Kind, InputPhoto]) -> Iterator[str]:
    for kind, photo in photos.items():
        yield from (f"{kind.upper()}: {note.split(';')[0]}" for note in photo.notes)
        if photo.alpha is not None:
            yield f"{kind.upper()}: transparency was left out"


@dataclass(kw_only=True, slots=True)
class Computation:
    """All figures of all cases."""

    cases: Sequence[Case]
    """Pictures to measure."""
    builds: Builds
    """Builds of the metrics to measure by."""
    known: Known
    """Figures that are known already."""
    protocol: ProtocolName
    """Protocol: the part of the pictures that is measured."""
    batch: int = 8
    """Pictures of one size that are measured together."""
    _hashes: dict[Path, str] = field(default_factory=dict)

    def fill(self, rank: int = 0, world: int = 1) -> None:
        """Compute this process's share of what is missing.

        Raises:
            SeeSRError: a picture cannot be read or does not fit.
        """
        from tqdm import tqdm

        chunks = [self.cases[start : start + self.batch] for start in range(0, len(self.cases), self.batch)]
        for chunk in tqdm(chunks[rank::world], unit="batch", disable=None):
            missing = [case for case in chunk if any(self.known.get(key) is None for key in self._keys(case))]
            if missing:
                self._fill(missing)

    def _keys(self, case: Case) -> Iterator[str]:
        yield self._note_key(case)
        yield from (self._key(case, row, metric) for row in case.rows for metric in self.metrics_of(row))

    def metrics_of(self, row: str) -> list[str]:
        """The metrics of single pictures that a row has: an original is not compared with itself."""
        return [key for key in self.builds.pictures if not (row == HR and BY_KEY[key].needs_original)]

    def _fill(self, cases: Sequence[Case]) -> None:
        loaded = {case.name: case.load(self.protocol) for case in cases}
        for case in cases:
            self.known.put(self._note_key(case), Outcome(None, loaded[case.name].notes))
        for row in (BICUBIC, SR, HR):
            for metric in self.metrics_of(row):
                wanted = [c for c in cases if row in c.rows and self.known.get(self._key(c, row, metric)) is None]
                for group in _of_one_size(wanted, lambda case: loaded[case.name].pictures[SR].shape):
                    self._measure(group, loaded, row, metric)

    def _measure(self, cases: Sequence[Case], loaded: Mapping[str, Loaded], row: str, metric: str) -> None:
        pictures = [loaded[case.name].pictures[row] for case in cases]
        needs_original = BY_KEY[metric].needs_original
        originals = [loaded[case.name].pictures[HR] for case in cases] if needs_original else []
        outcomes = self.builds.pictures[metric].measure(pictures, originals)
        for case, outcome in zip(cases, outcomes, strict=True):
            self.known.put(self._key(case, row, metric), outcome)

    def fill_sets(self) -> None:
        """Compute the metrics of whole sets; for one process.

        Raises:
            SeeSRError: a picture cannot be read or does not fit.
        """
        for metric, build in self.builds.sets.items():
            for row in (row for row in self.cases[0].rows if row != HR):
                key = self._set_key(row, metric)
                if self.known.get(key) is None:
                    with tempfile.TemporaryDirectory() as folder:
                        pictures, originals = self._write_set(Path(folder), row)
                        self.known.put(key, build.measure_set(pictures, originals))

    def _write_set(self, folder: Path, row: str) -> tuple[Path, Path]:
        """The pictures of a row and the originals as PNG, cut as everything else is."""
        places = folder / "pictures", folder / "originals"
        for place in places:
            place.mkdir()
        for case in self.cases:
            loaded = case.load(self.protocol)
            for place, title in zip(places, (row, HR), strict=True):
                as_picture(loaded.pictures[title]).save(place / f"{case.name}.png", compress_level=1)
        return places

    def rows(self) -> Rows:
        """Every outcome of single pictures."""
        return {
            row: {
                case.name: {metric: self._outcome(self._key(case, row, metric)) for metric in self.metrics_of(row)}
                for case in self.cases
            }
            for row in self.cases[0].rows
        }

    def set_figures(self) -> dict[str, dict[str, Outcome]]:
        """Outcomes of whole sets by row and metric."""
        rows = [row for row in self.cases[0].rows if row != HR]
        return {row: {metric: self._outcome(self._set_key(row, metric)) for metric in self.builds.sets} for row in rows}

    def notes(self) -> dict[str, list[str]]:
        """What reading had to change, and in which pictures."""
        found: dict[str, list[str]] = {}
        for case in self.cases:
            for note in filter(None, self._outcome(self._note_key(case)).why.split("; ")):
                found.setdefault(note, []).append(case.name)
        return found

    def contents(self) -> dict[str, str]:
        """A short hash of each folder's pictures."""
        kinds = self.cases[0].files
        return {kind: digest(self._hash(case.files[kind]).encode() for case in self.cases) for kind in kinds}

    def _outcome(self, key: str) -> Outcome:
        outcome = self.known.get(key)
        if outcome is None:
            raise DataError("A file was changed while it was measured; start the same command again.")
        return outcome

    def _key(self, case: Case, row: str, metric: str) -> str:
        kinds: dict[str, tuple[Kind, ...]] = {SR: ("sr",), BICUBIC: ("lr", "sr"), HR: ("hr",)}
        used = {*kinds[row], *(("hr",) if BY_KEY[metric].needs_original else ())}
        hashes = {str(kind): self._hash(path) for kind, path in case.files.items() if kind in used}
        return key_of({"row": row, **hashes, **self._what(metric, self.builds.pictures[metric].facts)})

    def _set_key(self, row: str, metric: str) -> str:
        return key_of({"row": row, **self.contents(), **self._what(metric, self.builds.sets[metric].facts)})

    def _note_key(self, case: Case) -> str:
        return key_of({"notes": [self._hash(path) for path in case.files.values()], "protocol": self.protocol})

    def _what(self, metric: str, facts: Facts) -> dict[str, str]:
        return {"metric": metric, "facts": repr(facts), "protocol": self.protocol}

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = sha256(path)
        return self._hashes[path]


def _of_one_size(cases: Iterable[Case], size: Callable[[Case], tuple[int, ...]]) -> Iterable[list[Case]]:
    groups: dict[tuple[int, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(size(case)), []).append(case)
    return groups.values()


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among those that `accelerate launch` or `torchrun` started; alone without them."""

    rank: int = 0
    """Number of this process."""
    world: int = 1
    """Number of processes."""
    wait: Callable[[], None] = lambda: None
    """Wait until all processes have come here."""

    @classmethod
    def here(cls) -> Processes:
        """Join the other processes."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(rank=state.process_index, world=state.num_processes, wait=state.wait_for_everyone)
