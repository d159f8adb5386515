"""Which file becomes which: a photo or a folder of photos in, a file or a folder out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ImageError, SettingsError
from ..pictures.opening import suffixes_read
from ..pictures.writing import FORMATS, check_target, check_writable

FOLDER_SUFFIX = ".png"


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


def plan_upscale(source: Path, target: Path, *, overwrite: bool) -> UpscaleJobs:
    """What to upscale from `source` (photo or folder) to `target`, which is found to be writable.

    Raises:
        ImageError: nothing to read, unknown suffix, or a result that exists.
        SettingsError: IN and OUT cannot go together.
        ResourceError: OUT cannot be written to.
    """
    if source.is_dir():
        return _plan_folder(source, target, overwrite=overwrite)
    if target.is_dir():
        target = target / f"{source.stem}{FOLDER_SUFFIX}"
    if target.exists():
        if source.exists() and target.samefile(source):
            raise SettingsError(f"IN and OUT are the same file, {source}: name another OUT.")
        if not overwrite:
            raise ImageError(f"{target} exists already: give --overwrite to replace it.")
    _require_exists(source)
    check_target(target)
    return UpscaleJobs(jobs=[Job(source, target)])


def _plan_folder(source: Path, target: Path, *, overwrite: bool) -> UpscaleJobs:
    if target.is_file() or (target.suffix.lower() in FORMATS and not target.is_dir()):
        raise SettingsError(f"IN is a folder, so OUT must be one, too, not the file {target}.")
    if target.is_dir() and target.samefile(source):
        raise SettingsError(f"IN and OUT are the same folder, {source}: name another OUT.")
    photos, left_out = list_photos(source)
    check_writable(target / f"result{FOLDER_SUFFIX}")
    pairs = [Job(photo, target / name) for photo, name in zip(photos, _names(photos), strict=True)]
    done = [job for job in pairs if job.target.exists() and not overwrite]
    jobs = [job for job in pairs if overwrite or not job.target.exists()]
    return UpscaleJobs(jobs=jobs, done=done, left_out=left_out, many=True)


def list_photos(folder: Path) -> tuple[list[Path], list[Path]]:
    """Pictures (by suffix, or without any) and other files of a folder, sorted; hidden files are passed over.

    Raises:
        ImageError: no pictures.
    """
    suffixes = suffixes_read()
    files = sorted(path for path in folder.iterdir() if os.path.isfile(path) and not path.name.startswith("."))
    photos = [path for path in files if not path.suffix or path.suffix.lower() in suffixes]
    if not photos:
        raise ImageError(f"{folder} holds no pictures: expected at least one, such as photo.jpg or photo.png.")
    return photos, [path for path in files if path not in photos]


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


def _names(photos: Iterable[Path]) -> list[str]:
    """Names of the results; photos that differ in their suffix alone keep it, so that none takes the other's place."""
    photos = list(photos)
    counts = Counter(photo.stem.casefold() for photo in photos)
    return [f"{photo.name if counts[photo.stem.casefold()] > 1 else photo.stem}{FOLDER_SUFFIX}" for photo in photos]
