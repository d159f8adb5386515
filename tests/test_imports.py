"""`seesr_core` is importable where neither the host nor the libraries of the extras are."""

from __future__ import annotations

import subprocess
import sys

from seesr_core import __version__

from .golden import ROOT

BLOCKED = ("comfy", "comfy_api", "folder_paths", "nodes", "diffusers", "peft", "accelerate", "transformers", "tqdm")
PROGRAM = f"""
import importlib, pkgutil, runpy, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
import seesr_core
names = [module.name for module in pkgutil.walk_packages(seesr_core.__path__, "seesr_core.")]
for name in names:
    importlib.import_module(name)
    sys.stdout.write(name + "\\n")
del sys.modules["seesr_core.__main__"]
sys.argv = ["seesr", "--version"]
runpy.run_module("seesr_core", run_name="__main__")
"""


def test_everything_imports_and_the_command_starts_without_the_host_and_the_extras() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *names, version = done.stdout.split()
    assert {"seesr_core.pipeline", "seesr_core.cli.main", "seesr_core.__main__", "seesr_core.method.rca"} <= set(names)
    assert version == __version__
