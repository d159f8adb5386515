"""Finding what can be converted among files and folders, by content."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import WeightsError
from ..formats.detect import Kind, detect
from ..formats.sources import TAG_LISTS
from ..runtime.files import listed
from .places import PUBLISHED

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_ADAPTERS = (Kind.DAPE_LORA, Kind.DAPE_PEFT)
_BASE_FILE = "512-base-ema.safetensors"


@dataclass(kw_only=True, slots=True)
class Material:
    """What was found to convert."""

    ram: list[Path] = field(default_factory=list)
    """RAM's published files."""
    adapters: list[Path] = field(default_factory=list)
    """DAPE adapters."""
    tag_lists: list[Path] = field(default_factory=list)
    """Folders with the tag lists."""
    seesr: list[Path] = field(default_factory=list)
    """Published SeeSR folders."""
    bases: list[Path] = field(default_factory=list)
    """Base models: diffusers folders, and single files."""
    others: dict[Path, str] = field(default_factory=dict)
    """Weights files that are something else, and what."""
    refused: dict[Path, str] = field(default_factory=dict)
    """Files that could not be read, and why."""

    def only(self, name: str) -> Path | None:
        """The one entry of the list `name`; None without any.

        Raises:
            WeightsError: there are several.
        """
        found: list[Path] = getattr(self, name)
        if len(found) > 1:
            raise WeightsError(
                f"Found more than one of what should be one: {', '.join(map(str, found))}. Name the right one alone."
            )
        return found[0] if found else None


def gather(paths: Iterable[Path]) -> Material:
    """Look at files, at folders, and one level into them.

    Raises:
        WeightsError: a path does not exist.
    """
    material = Material()
    for path in paths:
        if path.is_dir():
            _add_folder(material, path)
        elif path.is_file():
            _add_file(material, path)
        else:
            raise WeightsError(f"{path} does not exist: expected a file or a folder of weights.")
    return material


def comfy_folders(models: Path) -> list[Path]:
    """Where the host keeps what can be converted, as far as it is there."""
    folders = [models / "dape" / PUBLISHED, models / "seesr" / PUBLISHED]
    base = models / "checkpoints" / _BASE_FILE
    return [path for path in (*folders, base) if path.exists()]


def _add_folder(material: Material, folder: Path) -> None:
    for place in (folder, *(path for path in sorted(folder.iterdir()) if os.path.isdir(path) and path.name[0] != ".")):
        if is_published_folder(place):
            _add(material.seesr, place)
        elif is_base_folder(place):
            _add(material.bases, place)
        else:
            _add_contents(material, place)


def _add_contents(material: Material, folder: Path) -> None:
    if (folder / TAG_LISTS[0]).is_file():
        _add(material.tag_lists, folder)
    # What lies beside the two parts of a published folder is looked at, their insides are not.
    for path in _weights_files(folder):
        _add_file(material, path)


def _add_file(material: Material, path: Path) -> None:
    if path.name in TAG_LISTS:
        _add(material.tag_lists, path.parent)
        return
    try:
        found = detect(path)
    except WeightsError as error:
        material.refused[path] = str(error)
        return
    if found.kind is Kind.RAM:
        _add(material.ram, path)
    elif found.kind in _ADAPTERS:
        _add(material.adapters, path)
    elif found.kind in (Kind.SD2, Kind.BASE):
        _add(material.bases, path)
    else:
        material.others[path] = found.label


def _add(found: list[Path], path: Path) -> None:
    if path not in found:
        found.append(path)


def _weights_files(folder: Path) -> Iterator[Path]:
    return (path for path in listed(folder) if path.suffix in SUFFIXES and os.path.isfile(path))


def is_base_folder(folder: Path) -> bool:
    """A diffusers folder of a whole model."""
    return _has(folder, "unet") and _has(folder, "vae")


def is_published_folder(folder: Path) -> bool:
    """The published SeeSR folder."""
    return _has(folder, "unet") and _has(folder, "controlnet") and not _has(folder, "vae")


def _has(folder: Path, name: str) -> bool:
    return os.path.isdir(folder / name)  # False also where we may not look, which Path.is_dir raises
