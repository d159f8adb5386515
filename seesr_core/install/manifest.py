"""What there is to download: `manifest.json`, read into plain objects.

A file's `size` and `sha256` are facts that a download must meet; `about` is only an estimate, for asking whether the
disk has room. Where the former are unknown the asset says so in `unverified`, and the file is verified by its content.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SettingsError

MANIFEST = Path(__file__).parent / "manifest.json"
FOLDER, COMFY = "folder", "comfy"
DEFAULT_ASSETS = ("base", "seesr", "dape", "ram")
"""What one working model consists of; SD-turbo is an alternative base."""
_SMALL = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One place that offers a file: a hub repository, or a plain URL."""

    repo: str = ""
    """Hub repository, `owner/name`."""
    type: str = "model"
    """Kind of hub repository: model, space or dataset."""
    prefix: str = ""
    """Folder in the repository, with a slash at its end."""
    revision: str = "main"
    """Branch, tag or commit of the repository."""
    url: str = ""
    """Address of the file itself, where it is on no hub."""

    def __str__(self) -> str:
        return self.url or f"{self.repo}{' (space)' if self.type == 'space' else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """One file of an asset."""

    path: str
    """Where it is, below the source's prefix and below the asset's place."""
    kind: str
    """What its content must be: a `formats.detect.Kind`, `json` or `text`."""
    size: int | None = None
    """Exact size of the file in bytes, where known."""
    sha256: str | None = None
    """Hash of the whole file, where known."""
    parameters: int | None = None
    """How many numbers a weights file must hold, where known."""
    values: dict[str, Any] = field(default_factory=dict)
    """Entries that a JSON file must have, if it has them at all."""
    about: int = _SMALL
    """Estimated bytes, where the exact number is unknown."""
    optional: bool = False
    """Whether the asset works without it."""
    sources: tuple[Source, ...] = ()
    """Where it is offered, tried in this order."""

    @property
    def expected_bytes(self) -> int:
        """Size of the file in bytes, exact or estimated."""
        return self.about if self.size is None else self.size


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """An asset as one kind of reader wants it."""

    place: str
    """Folder below the target (a folder of weights, or the host's `models`)."""
    files: tuple[RemoteFile, ...]
    """The files of the layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """Something that can be downloaded by name."""

    name: str
    """Name of the asset on the command line."""
    title: str
    """What the asset is, in a few words."""
    licence: str
    """Licence of the asset, as its publishers name it."""
    unverified: str
    """Which of these facts nobody has checked; empty if all were."""
    needs: tuple[str, ...]
    """Assets that are of no use apart from it."""
    layouts: dict[str, Layout]
    """Layout by target: `folder` (this project's command line) or `comfy`."""


def load_manifest(path: Path = MANIFEST) -> dict[str, Asset]:
    """All assets by name, in the order of the file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return {entry["name"]: _asset(entry) for entry in data["assets"]}


def choose(assets: dict[str, Asset], names: list[str]) -> list[Asset]:
    """The assets called `names` ("all" for every one) with what they need, in the manifest's order.

    Raises:
        SettingsError: no such asset.
    """
    wanted = set(assets) if "all" in names else set(names)
    unknown = sorted(wanted - set(assets))
    if unknown:
        raise SettingsError(f"There is no asset {unknown[0]!r}: choose among {', '.join(assets)} and all.")
    wanted |= {need for name in wanted for need in assets[name].needs}
    return [asset for name, asset in assets.items() if name in wanted]


def _asset(entry: dict[str, Any]) -> Asset:
    plain = {name: entry[name] for name in ("name", "title", "licence", "unverified")}
    layouts = {name: _layout(value) for name, value in entry["layouts"].items()}
    return Asset(**plain, needs=tuple(entry.get("needs", ())), layouts=layouts)


def _layout(entry: dict[str, Any]) -> Layout:
    shared = entry["sources"]
    return Layout(place=entry["place"], files=tuple(_file(item, shared) for item in entry["files"]))


def _file(entry: dict[str, Any], shared: list[dict[str, Any]]) -> RemoteFile:
    sources = tuple(Source(**item) for item in entry.get("sources", shared))
    return RemoteFile(**{**entry, "sources": sources})
