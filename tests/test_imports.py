"""What imports what: the host and the extras only where they are needed, and nothing in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_comes_without_torch(option: str) -> None:
    """Importing torch takes seconds."""
    program = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['seesr', {option!r}]"
    program += "; runpy.run_module('seesr_core', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == __version__ or "doctor" in done.stdout


PACKAGES = ("nodes", "seesr_core", "trainer")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def _statements(node: ast.AST, *, within_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if within_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _statements(child, within_functions=within_functions)


def _imported(name: str, path: Path, *, within_functions: bool = False) -> set[str]:
    """The project's own modules that a module imports, for types alone as well."""
    found: set[str] = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in _statements(ast.parse(path.read_text("utf-8")), within_functions=within_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*outer, *(node.module.split(".") if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {source}
    return {module for module in found if module.split(".")[0] in PACKAGES} - {name}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: _imported(name, path) for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("package", "allowed"), [("seesr_core", set()), ("nodes", {"seesr_core"}), ("trainer", {"seesr_core"})]
)
def test_plugin_and_trainer_import_the_core_and_not_each_other(package: str, allowed: set[str]) -> None:
    for name, path in MODULES.items():
        if name.split(".")[0] == package:
            roots = {module.split(".")[0] for module in _imported(name, path, within_functions=True)}
            assert roots <= allowed | {package}, name
