"""Which file becomes which: a photo or a folder of photos in, a file or a folder out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import takewhile
from pathlib import Path

from ..errors import ImageError, SeeSRError, SettingsError
from ..pictures.opening import open_picture, suffixes_read
from ..pictures.reading import frame_count
from ..pictures.writing import FORMATS, check_target, check_writable

FOLDER_SUFFIX = ".png"
SAME = "same"
"""Format of results that is the photo's own."""


@dataclass(frozen=True, slots=True)
class Job:
    """One photo to upscale."""

    source: Path
    """The photo's file."""
    target: Path
    """The file that its result is written to."""


@dataclass(kw_only=True, slots=True)
class UpscaleJobs:
    """What a command has to do."""

    jobs: list[Job]
    """Photos without a result."""
    done: list[Job] = field(default_factory=list)
    """Photos whose result exists."""
    left_out: list[Path] = field(default_factory=list)
    """Files whose suffix is not that of a picture."""
    many: bool = False
    """Whether a folder was asked for: then one bad photo does not stop the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """How results are named, and which photos of many are this process's."""

    format: str | None = None
    """Suffix of results without its dot, or "same" for the photo's own; None: OUT's own, in a folder PNG."""
    suffix: str = ""
    """What follows the photo's name in the result's."""
    recursive: bool = False
    """Whether folders in the folder are searched, too, and made again in OUT."""
    share: tuple[int, int] = (0, 1)
    """Number of this process, from 0, and how many there are: each takes every so-manieth photo."""

    frames: bool = False
    """Whether animations and files of several pages are taken whole, and stay what they are."""

    def of(self, photo: Path, *, with_suffix: bool = False) -> str:
        """The result's name of a photo; `with_suffix` keeps its own suffix in the middle."""
        return f"{photo.name if with_suffix else photo.stem}{self.suffix}{self._ending(photo)}"

    def _ending(self, photo: Path) -> str:
        if self.format not in (None, SAME):
            return f".{self.format}"
        own = photo.suffix.lower()
        whole = own in FORMATS and self.frames and has_frames(photo)
        still = own in FORMATS and self.format == SAME and FORMATS[own].stills
        return own if whole or still else FOLDER_SUFFIX


def has_frames(photo: Path) -> bool:
    """Whether a file holds several pictures; one that cannot be read is told of when its turn comes."""
    try:
        with open_picture(photo) as image:
            return frame_count(image) > 1
    except SeeSRError:
        return False


def plan_upscale(source: Path, target: Path, *, overwrite: bool, naming: Naming | None = None) -> UpscaleJobs:
    """What to upscale from `source` (photo, folder or glob pattern) to `target`, which is found to be writable.

    Raises:
        ImageError: nothing to read, unknown suffix, or a result that exists.
        SettingsError: IN and OUT cannot go together.
        ResourceError: OUT cannot be written to.
    """
    naming = naming or Naming()
    if source.is_dir() or _is_pattern(source):
        return _plan_folder(source, target, overwrite=overwrite, naming=naming)
    if target.is_dir():
        target = target / naming.of(source)
    elif naming.format not in (None, SAME) and target.suffix.lower() != f".{naming.format}":
        raise SettingsError(f"OUT is {target}, but --format says {naming.format}: give one of them.")
    if target.exists():
        if source.exists() and target.samefile(source):
            raise SettingsError(f"IN and OUT are the same file, {source}: name another OUT.")
        if not overwrite:
            raise ImageError(f"{target} exists already: give --overwrite to replace it.")
    _require_exists(source)
    check_target(target)
    return UpscaleJobs(jobs=[Job(source, target)])


def _is_pattern(source: Path) -> bool:
    """Whether IN is a glob pattern, and no file of that very name."""
    return any(sign in str(source) for sign in "*?[") and not source.exists()


def _plan_folder(source: Path, target: Path, *, overwrite: bool, naming: Naming) -> UpscaleJobs:
    if target.is_file() or (target.suffix.lower() in FORMATS and not target.is_dir()):
        raise SettingsError(f"IN is a folder, so OUT must be one, too, not the file {target}.")
    if target.is_dir() and source.is_dir() and target.samefile(source):
        raise SettingsError(f"IN and OUT are the same folder, {source}: name another OUT.")
    root, photos, left_out = _photos_of(source, recursive=naming.recursive, without=target)
    check_writable(target / f"result{FOLDER_SUFFIX}")
    places = [photo.relative_to(root).parent for photo in photos]
    names = _names(photos, places, naming)
    pairs = [Job(photo, target / place / name) for photo, place, name in zip(photos, places, names, strict=True)]
    # Shared out before anything is left out: other processes may be at work already.
    pairs = pairs[naming.share[0] :: naming.share[1]]
    done = [job for job in pairs if job.target.exists() and not overwrite]
    jobs = [job for job in pairs if overwrite or not job.target.exists()]
    return UpscaleJobs(jobs=jobs, done=done, left_out=left_out, many=True)


def _photos_of(source: Path, *, recursive: bool, without: Path) -> tuple[Path, list[Path], list[Path]]:
    """The folder that photos' places count from, the photos, and other files of a folder or pattern."""
    if source.is_dir() and not recursive:
        return source, *list_photos(source)
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if without not in path.parents)
        files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(source).parts)]
        return source, *_sorted_out(files, source)
    fixed = list(takewhile(lambda part: not any(sign in part for sign in "*?["), source.parts))
    root = Path(*fixed) if fixed else Path()
    return root, *_sorted_out(sorted(map(Path, glob(str(source), recursive=True))), source)


def list_photos(folder: Path) -> tuple[list[Path], list[Path]]:
    """Pictures (by suffix, or without any) and other files of a folder, sorted; hidden files are passed over.

    Raises:
        ImageError: no pictures.
    """
    return _sorted_out(sorted(path for path in folder.iterdir() if not path.name.startswith(".")), folder)


def _sorted_out(paths: Iterable[Path], source: Path) -> tuple[list[Path], list[Path]]:
    """Pictures and other files among `paths`, which come of `source`; folders are passed over.

    What cannot be opened, such as a link that leads nowhere, counts as what its name says, so that it is told.
    """
    photos, others, suffixes = list[Path](), list[Path](), suffixes_read()
    for path in paths:
        if not os.path.isdir(path):
            (photos if not path.suffix or path.suffix.lower() in suffixes else others).append(path)
    if not photos:
        raise ImageError(f"{source} holds no pictures: expected at least one, such as photo.jpg or photo.png.")
    return photos, others


def plan_reading(source: Path) -> UpscaleJobs:
    """What to read from `source`; jobs have no results of their own.

    Raises:
        ImageError: nothing to read.
    """
    if source.is_dir():
        photos, left_out = list_photos(source)
        return UpscaleJobs(jobs=[Job(photo, photo) for photo in photos], left_out=left_out, many=True)
    _require_exists(source)
    return UpscaleJobs(jobs=[Job(source, source)])


def _require_exists(source: Path) -> None:
    if not source.exists():
        raise ImageError(f"{source} does not exist: expected a picture or a folder of pictures.")


def _names(photos: Sequence[Path], places: Sequence[Path], naming: Naming) -> list[str]:
    """Names of the results; photos that differ in their suffix alone keep it, so that none takes the other's place."""
    plain = [(place, naming.of(photo).casefold()) for photo, place in zip(photos, places, strict=True)]
    counts = Counter(plain)
    return [naming.of(photo, with_suffix=counts[key] > 1) for photo, key in zip(photos, plain, strict=True)]
