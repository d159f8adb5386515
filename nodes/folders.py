"""What the host's loaders find: folders for our kinds of files, the embedded small model, and its example photo."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path, PurePath

import folder_paths

from ..seesr_core.errors import WeightsError
from ..seesr_core.runtime.files import inside

NANO = Path(__file__).resolve().parents[1] / "seesr_core" / "nano"
EXAMPLE, SCENE = "seesr_example.jpg", "seesr_scene.png"
"""Names of the example photo, and of a drawn scene for SegSR's toy, in the host's input folder."""
_OFFERED = {EXAMPLE: "example.jpg", SCENE: "example_scene.png"}

DAPE, CONTROL, SEGSR = "dape", "seesr", "segsr"
_EXTENSIONS = {DAPE: {".safetensors", ".pth"}, CONTROL: {".safetensors"}, SEGSR: {".safetensors"}}
_PUBLISHED_PARTS = ("unet", "controlnet")


def register() -> None:
    """Make our folders in `models` known, and the embedded model and its photo; safe to call again."""
    from .host import nano

    for kind, extensions in _EXTENSIONS.items():
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind), is_default=True)
        # A kind that the host did not know starts with no extensions, which means every file.
        folder_paths.folder_names_and_paths[kind][1].update(extensions)
    for kind in ("checkpoints", DAPE, CONTROL, SEGSR):
        folder_paths.add_model_folder_path(kind, str(NANO / kind))
    offer_example()
    nano.register()


def offer_example() -> None:
    """Copy the example pictures to where Load Image looks, unless they are there; a read-only folder is left alone."""
    for name, source in _OFFERED.items():
        target = Path(folder_paths.get_input_directory()) / name
        if not target.exists():
            with contextlib.suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(NANO / source, target)


def control_names() -> list[str]:
    """Names for the loader: single files, and the published folders (each with `unet` and `controlnet` inside)."""
    names: set[str] = set()
    for name in folder_paths.get_filename_list(CONTROL):
        path = PurePath(name)
        in_published = path.parent.name in _PUBLISHED_PARTS and path.parents[1] != PurePath(".")
        names.add(str(path.parents[1]) if in_published else name)
    return sorted(names)


def control_path(name: str) -> Path:
    """The file or published folder that `name` of `control_names` stands for.

    Raises:
        WeightsError: it is gone.
    """
    return _find(CONTROL, name, folders_too=True)


def dape_names() -> list[str]:
    """Names of the files that the tagger's loader lists."""
    return folder_paths.get_filename_list(DAPE)


def dape_path(name: str) -> Path:
    """The file that `name` of `dape_names` stands for.

    Raises:
        WeightsError: it is gone.
    """
    return _find(DAPE, name)


def segsr_names() -> list[str]:
    """Names of the files that SegSR's loader lists."""
    return folder_paths.get_filename_list(SEGSR)


def segsr_path(name: str) -> Path:
    """The file that `name` of `segsr_names` stands for.

    Raises:
        WeightsError: it is gone.
    """
    return _find(SEGSR, name)


def _find(kind: str, name: str, *, folders_too: bool = False) -> Path:
    roots = folder_paths.get_folder_paths(kind)
    for root in roots:
        try:
            path = inside(Path(root), name)
        except ValueError as error:
            raise WeightsError(f"{error}; choose one of the loader's list.") from error
        if os.path.isfile(path) or (folders_too and os.path.isdir(path)):
            return path
    raise WeightsError(f"{name} is no longer in {roots[0]}; put it back or choose another file, then refresh the page.")
