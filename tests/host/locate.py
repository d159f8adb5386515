"""Where the host is, whether this environment can run it, and the plugin loaded as the host loads it."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

PLUGIN = Path(__file__).parents[2]
ALIAS = "seesr_plugin"
"""Name under which the plugin is loaded: its own `nodes` must not shadow the host's."""
_NEEDED = ("torchvision", "torchaudio", "aiohttp", "torchsde", "comfyui_frontend_package")


def host_folder() -> Path | None:
    """`$COMFYUI_PATH`, else comfy-cli's default; None if neither holds a host."""
    for place in (os.environ.get("COMFYUI_PATH"), Path.home() / "comfy" / "ComfyUI"):
        if place and (Path(place) / "comfy" / "model_patcher.py").is_file():
            return Path(place).resolve()
    return None


def reason_to_skip() -> str | None:
    """Why host tests cannot run here; None if they can."""
    if host_folder() is None:
        return "no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI"
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return f"this environment lacks the host's requirements {', '.join(lacking)}" if lacking else None


def import_host() -> None:
    """Put the host first on `sys.path` (its `nodes` must win) and let it run on the CPU."""
    folder = str(host_folder())
    if sys.path[0] != folder:
        sys.path.insert(0, folder)
    if "comfy.cli_args" not in sys.modules:
        argv, sys.argv = sys.argv, sys.argv[:1]
        try:
            importlib.import_module("comfy.options").enable_args_parsing(False)
            args = importlib.import_module("comfy.cli_args").args
            args.cpu, args.base_directory = True, _own_base()
        finally:
            sys.argv = argv


def _own_base() -> str:
    """An empty folder for models, input and output, gone at the end: the host's own stay as they are."""
    folder = tempfile.TemporaryDirectory(prefix="seesr-host-")
    atexit.register(folder.cleanup)
    return folder.name


def load_plugin() -> ModuleType:
    """The plugin under its alias, as the host loads it; its parts are `seesr_plugin.nodes…` and so on.

    Classes of the plugin must be taken from here: `seesr_core` imported directly is another copy.
    """
    if ALIAS not in sys.modules:
        import_host()
        spec = importlib.util.spec_from_file_location(
            ALIAS, PLUGIN / "__init__.py", submodule_search_locations=[str(PLUGIN)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[ALIAS] = module
        spec.loader.exec_module(module)
    return sys.modules[ALIAS]


def plugin(name: str) -> ModuleType:
    """A module of the plugin, e.g. `plugin("nodes.host.rca")`."""
    load_plugin()
    return importlib.import_module(f"{ALIAS}.{name}")
