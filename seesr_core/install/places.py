"""Where things belong: a folder of weights for the command line, or the model folders of a ComfyUI installation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SettingsError
from ..runtime.files import read_text
from .manifest import COMFY, FOLDER, Asset, RemoteFile

PUBLISHED = "published"
"""Folder of what has to be converted, inside the host's `models/dape` and `models/seesr`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A folder that receives weights."""

    root: Path
    """The folder of weights, or the host's `models`."""
    layout: str
    """`folder` or `comfy`."""

    @classmethod
    def folder(cls, path: Path) -> Target:
        """A folder that `--model` can name afterwards.

        Raises:
            SettingsError: `path` is a file.
        """
        if path.is_file():
            raise SettingsError(f"{path} is a file: expected a folder for the weights.")
        return cls(root=path, layout=FOLDER)

    @classmethod
    def comfy(cls, path: Path) -> Target:
        """The model folders of the ComfyUI installation at `path`.

        Raises:
            SettingsError: there is none.
        """
        return cls(root=comfy_models(path), layout=COMFY)

    @property
    def argument(self) -> str:
        """How the command line names this target."""
        return f"--comfy {self.root.parent}" if self.layout == COMFY else f"--to {self.root}"

    def place(self, asset: Asset) -> Path:
        """The folder of an asset."""
        return self.root / asset.layouts[self.layout].place

    def files(self, asset: Asset) -> list[tuple[RemoteFile, Path]]:
        """The asset's files with the paths they get."""
        return [(file, self.place(asset) / file.path) for file in asset.layouts[self.layout].files]


def extra_folders(models: Path, kind: str) -> list[Path]:
    """Folders for `kind` that the host's `extra_model_paths.yaml` adds; none if that cannot be read."""
    config = models.parent / "extra_model_paths.yaml"
    groups = _read_yaml(config)
    found: list[Path] = []
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and group.get(kind):
            base = config.parent / os.path.expanduser(os.path.expandvars(str(group.get("base_path") or "")))
            found += [base / line.strip() for line in str(group[kind]).splitlines() if line.strip()]
    return [folder for folder in found if os.path.isdir(folder)]


def _read_yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        return None
    try:
        return yaml.safe_load(read_text(path, 1 << 20))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def comfy_models(path: Path) -> Path:
    """The folder `models` of an installation; its base directory alone (`--base-directory`) will do.

    Raises:
        SettingsError: neither an installation nor a base directory.
    """
    if path.name == "models" and path.is_dir():
        path = path.parent
    if not (path / "models").is_dir():
        raise SettingsError(
            f"{path} is no ComfyUI folder: expected one with `models` inside, where main.py and custom_nodes are, too."
        )
    return path / "models"
