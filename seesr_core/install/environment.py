"""The machine and its software, as far as they matter here."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import __version__
from ..runtime.devices import AUTO, choose_device, choose_dtype
from ..runtime.files import read_text
from ..runtime.memory import available_memory

PACKAGES = ("diffusers", "transformers", "huggingface_hub", "safetensors", "einops", "kornia", "numpy", "Pillow")
COMMAND_LINE = ("diffusers", "transformers", "huggingface_hub")
"""Packages that `upscale` and `download` need and ComfyUI's nodes do not."""
OLDEST_PYTHON, OLDEST_TORCH, OLDEST_HOST = (3, 10), (2, 4), (0, 3, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Facts, without judgement."""

    version: str
    """Version of this project."""
    python: str
    """Version and place of the interpreter."""
    system: str
    """Operating system and processor."""
    torch: str
    """Version of torch."""
    device: str
    """Where networks would run, by default."""
    dtype: str
    """Precision in which networks would run, by default."""
    threads: int
    """Number of torch's threads on the CPU."""
    memory: int | None
    """Bytes that are free in main memory."""
    device_memory: int | None
    """Bytes that are free on the device, if that is not the CPU."""
    packages: dict[str, str]
    """Versions; empty text for what is not installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A ComfyUI installation."""

    root: Path
    """The host's folder."""
    version: str
    """The host's version; empty if it states none."""
    plugins: tuple[Path, ...]
    """Where this project lies in `custom_nodes`."""


def look_around() -> Environment:
    """The environment of this process."""
    device = choose_device(AUTO)
    return Environment(
        version=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} on {platform.machine()}",
        torch=torch.__version__,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        dtype=str(choose_dtype(AUTO, device)).removeprefix("torch."),
        threads=torch.get_num_threads(),
        memory=available_memory(),
        device_memory=None if device.type == "cpu" else available_memory(device),
        packages={name: _version(name) for name in PACKAGES},
    )


def look_at_host(models: Path) -> Host:
    """The installation whose model folder is `models`; a bare base directory has no version."""
    root = models.parent
    nodes = root / "custom_nodes"
    found = [path for path in sorted(nodes.iterdir()) if (path / "seesr_core").is_dir()] if nodes.is_dir() else []
    return Host(root=root, version=_host_version(root), plugins=tuple(found))


def free_disk(folder: Path) -> int | None:
    """Bytes free where `folder` is or would be made; None where that cannot be found out."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), None)
    try:
        return shutil.disk_usage(place).free if place is not None else None
    except OSError:
        return None


def as_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _host_version(root: Path) -> str:
    try:
        text = read_text(root / "comfyui_version.py", 1 << 20, errors="replace")
    except OSError:
        return ""
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found[1] if found else ""
