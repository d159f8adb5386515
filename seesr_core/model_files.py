"""Which files of a folder make a whole model: base, control and tagger, told by content and not by name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import WeightsError
from .formats import sources
from .formats.detect import FileKind, Kind, detect
from .formats.sources import TAG_LISTS, Source
from .runtime.files import listed

log = logging.getLogger(__name__)

NANO = "nano"
"""Name of the embedded small model."""
NANO_FOLDER = Path(__file__).parent / "nano"

_RUN, _FINISHED = "run.json", "model"
"""What the folder of a training run holds, and where in it a finished model lies."""
_ADAPTERS = (Kind.DAPE_LORA, Kind.DAPE_PEFT)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_TAG_LIST_SOURCE = Source(
    f"RAM's tag lists {', '.join(TAG_LISTS)}", "github.com/xinyu1205/recognize-anything, folder ram/data"
)
_BASE = Source(
    f"{sources.BASE_FOLDER.name}, or a base file of this project",
    f"{sources.BASE_FOLDER.where}, or `python -m trainer.nano`",
)
_CONTROL = Source(f"{sources.PUBLISHED.name}, or {sources.CONTROL.name}", sources.PUBLISHED.where)
_TAGGER = Source(
    f"{sources.DAPE.name}, or {sources.RAM.name} with {sources.DAPE_LORA.name}",
    f"{sources.RAM.where} and {sources.DAPE_LORA.where}",
)


@dataclass(kw_only=True, slots=True, frozen=True)
class TaggerFiles:
    """Where the tagger of a model lies."""

    weights: Path
    """A DAPE file of this project, or RAM's published file."""
    adapter: Path | None = None
    """The DAPE adapter of RAM's file."""
    tag_lists: Path | None = None
    """Folder with `TAG_LISTS`, for RAM's file."""


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelFiles:
    """Where the parts of a model lie."""

    base: Path
    """A base file of this project, or a diffusers folder."""
    control: Path
    """A SeeSR file of this project, or the published folder."""
    tagger: TaggerFiles
    """The tagger."""


@dataclass(kw_only=True, slots=True, frozen=True)
class GivenFiles:
    """Parts of a model that are named one by one; they take the place of those that a folder holds."""

    base: Path | None = None
    """A base file of this project, or a diffusers folder."""
    control: Path | None = None
    """A SeeSR file of this project, the published folder, or a run folder whose newest export is meant."""
    dape: Path | None = None
    """A tagger of this project, or RAM's file or its adapter beside each other."""


def find_model(model: str | Path, given: GivenFiles = GivenFiles()) -> ModelFiles:
    """The parts of a model: "nano", or a folder with a base, a control part and a tagger in it or one level below.

    Of a part that comes several times in the folder of a training run the newest is meant; a finished model in it, its
    folder `model`, comes first.

    Raises:
        WeightsError: no such folder; a part is missing, comes twice, or is a damaged or another file.
    """
    if given.base and given.control and given.dape:
        return ModelFiles(base=given.base, control=_control_file(given.control), tagger=tagger_files(given.dape))
    contents = _Contents.scan(_folder(model))
    return ModelFiles(
        base=given.base or contents.one(_BASE, "base model", (Kind.BASE,), _is_base_folder),
        control=_control_file(given.control) if given.control else _control(contents),
        tagger=tagger_files(given.dape) if given.dape else _tagger(contents),
    )


def find_tagger(model: str | Path, given: GivenFiles = GivenFiles()) -> TaggerFiles:
    """The tagger alone; the rest of the model may be missing.

    Raises:
        WeightsError: as `find_model`.
    """
    return tagger_files(given.dape) if given.dape else _tagger(_Contents.scan(_folder(model)))


def _control(contents: _Contents) -> Path:
    # Like our tagger, our control part comes before the published folder that it was converted from.
    ours = contents.find("control part", (Kind.CONTROL,))
    return ours or contents.one(_CONTROL, "control part", (), _is_published_folder)


def _control_file(path: Path) -> Path:
    """The file or published folder that `path` is, or the newest export in a run folder."""
    return _control(_Contents.scan(path)) if path.is_dir() and not _is_published_folder(path) else path


def tagger_files(path: Path) -> TaggerFiles:
    """The tagger that one file stands for; RAM's file, its adapter and the tag lists find each other in one folder.

    Raises:
        WeightsError: damaged, or RAM's file without the others.
    """
    kind = detect(path).kind
    if kind is not Kind.RAM and kind not in _ADAPTERS:
        return TaggerFiles(weights=path)
    contents = _Contents.scan(path.parent)
    if kind is Kind.RAM:
        return _ram(contents, path, contents.one(sources.DAPE_LORA, "DAPE adapter", _ADAPTERS))
    return _ram(contents, contents.one(sources.RAM, "tagger", (Kind.RAM,)), path)


def _folder(model: str | Path) -> Path:
    folder = NANO_FOLDER if str(model) == NANO else Path(model)
    if folder.is_file():
        raise WeightsError(
            f"{folder} is a file ({detect(folder).label}): expected a folder that holds a base model, a control part "
            "and a tagger."
        )
    if not folder.is_dir():
        raise WeightsError(
            f"There is no model {folder}: expected {NANO} or a folder with a base model, a control part and a tagger."
        )
    return folder


@dataclass(kw_only=True, slots=True)
class _Contents:
    """The weights files of a folder and of the folders in it."""

    root: Path
    folders: list[Path]
    kinds: dict[Path, FileKind] = field(default_factory=dict)
    refused: list[WeightsError] = field(default_factory=list)
    is_run: bool = False

    @classmethod
    def scan(cls, root: Path) -> _Contents:
        """Look at the headers of everything that may be weights."""
        folders = [root, *(path for path in sorted(root.iterdir()) if os.path.isdir(path))]
        is_run = any(os.path.isfile(folder / _RUN) for folder in folders)
        if is_run and os.path.isdir(root / _FINISHED):
            return cls.scan(root / _FINISHED)
        contents = cls(root=root, folders=folders, is_run=is_run)
        for path in contents._candidates():
            try:
                contents.kinds[path] = detect(path)
            except WeightsError as error:
                log.info("%s", error)
                contents.refused.append(error)
        return contents

    def _candidates(self) -> Iterator[Path]:
        for folder in self.folders:
            yield from (path for path in listed(folder) if path.suffix in _SUFFIXES and os.path.isfile(path))

    def find(self, part: str, kinds: tuple[Kind, ...], is_folder: Callable[[Path], bool] | None = None) -> Path | None:
        """The one file of `kinds`, or folder of which `is_folder` is true; None without one."""
        found = [path for path, kind in self.kinds.items() if kind.kind in kinds]
        found += [folder for folder in self.folders if is_folder is not None and is_folder(folder)]
        if len(found) > 1 and self.is_run:
            found = [max(found, key=lambda path: path.stat().st_mtime_ns)]
            log.info("of several the newest %s is taken: %s", part, found[0])
        if len(found) > 1:
            raise WeightsError(
                f"{self.root} holds more than one {part}: {', '.join(map(str, found))}. Leave one of them there."
            )
        return found[0] if found else None

    def one(
        self, source: Source, part: str, kinds: tuple[Kind, ...], is_folder: Callable[[Path], bool] | None = None
    ) -> Path:
        """The same, required."""
        return self.find(part, kinds, is_folder) or self.missing(source, part)

    def missing(self, source: Source, part: str) -> Path:
        """Refuse: a file that could not be read may well be the missing one, so its own sentence comes first."""
        if self.is_run:
            raise WeightsError(
                f"{self.root} is the folder of a training run and has no {part}: name the files that it was trained "
                "with, on the command line by --base and --dape."
            )
        if self.refused:
            raise self.refused[0]
        others = ", ".join(f"{path} looks like {kind.label}" for path, kind in list(self.kinds.items())[:3])
        raise WeightsError(
            f"{self.root} has no {part}{f' ({others})' if others else ''}; expected {source.name}. "
            f"Get it from {source.where}."
        )


def _tagger(contents: _Contents) -> TaggerFiles:
    ours = contents.find("tagger", (Kind.DAPE,))
    if ours is not None:
        return TaggerFiles(weights=ours)
    weights = contents.one(_TAGGER, "tagger", (Kind.RAM,))
    return _ram(contents, weights, contents.one(sources.DAPE_LORA, "DAPE adapter", _ADAPTERS))


def _ram(contents: _Contents, weights: Path, adapter: Path) -> TaggerFiles:
    lists = next((folder for folder in contents.folders if os.path.isfile(folder / TAG_LISTS[0])), None)
    return TaggerFiles(
        weights=weights, adapter=adapter, tag_lists=lists or contents.missing(_TAG_LIST_SOURCE, "tag list")
    )


def _is_base_folder(folder: Path) -> bool:
    return os.path.isdir(folder / "unet") and os.path.isdir(folder / "vae")


def _is_published_folder(folder: Path) -> bool:
    return os.path.isdir(folder / "unet") and os.path.isdir(folder / "controlnet")
