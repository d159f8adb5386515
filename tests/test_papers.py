"""What README, docs, contributing and release papers name exists: files, modules, links, workflows, versions."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from seesr_core import __version__
from seesr_core.cli.main import build_parser

from .golden import ROOT

PAPERS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "trainer/README.md"))]
PAPERS += sorted(ROOT.glob("docs/*.md"))
WORDS, COLUMNS = 1000, 120
_PATH = re.compile(r"`((?:nodes|seesr_core|trainer|tests|tools|docs|web|locales|workflows|\.ci|\.github)/[^\s`*]*)`")
_MODULE = re.compile(r"(?:python -m|-m) ((?:seesr_core|trainer|tests|tools)[\w.]*)|`((?:trainer|tools)\.[\w.]+)[` ]")
_COMMAND = re.compile(r"python -m seesr_core (\w+)([^`\n]*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_WORKFLOW = re.compile(r"`(\d+_\w+)`")
_ROW = re.compile(r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)

every_paper = pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.relative_to(ROOT).as_posix())


def named_modules(text: str) -> Iterator[str]:
    """Modules of ours that a text names in commands or by themselves."""
    for found in _MODULE.finditer(text):
        yield (found[1] or found[2]).rstrip(".")


def headings(paper: Path) -> set[str]:
    """The anchors of a page as its readers' sites make them."""
    titles = re.findall(r"^#+ (.+)$", paper.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_paper
def test_files_exist(paper: Path) -> None:
    named = [name for name in _PATH.findall(paper.read_text(encoding="utf-8")) if "LANGUAGE" not in name]
    assert [name for name in named if not (ROOT / name).exists()] == []


@every_paper
def test_modules_exist(paper: Path) -> None:
    names = set(named_modules(paper.read_text(encoding="utf-8")))
    assert [name for name in sorted(names) if importlib.util.find_spec(name) is None] == []


@every_paper
def test_commands_have_these_options(paper: Path) -> None:
    """Every `--option` beside `python -m seesr_core COMMAND` is one of that command's."""
    for name, rest in _COMMAND.findall(paper.read_text(encoding="utf-8")):
        (commands,) = (action.choices for action in build_parser(name)._actions if isinstance(action.choices, dict))
        options = re.findall(r"--[a-z][a-z-]*", rest.partition("#")[0])
        assert set(options) <= set(commands[name]._option_string_actions), f"{name} {rest}"


@every_paper
def test_links_lead_somewhere(paper: Path) -> None:
    for link in _LINK.findall(paper.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (paper.parent / file).resolve() if file else paper
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@every_paper
def test_workflows_exist(paper: Path) -> None:
    named = _WORKFLOW.findall(paper.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / "workflows" / f"{name}.json").is_file()] == []


@every_paper
def test_lines_fit(paper: Path) -> None:
    """Tables cannot be broken, commands to be pasted whole must not be."""
    lines = paper.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > COLUMNS and not line.startswith(("|", "    "))] == []


def test_readme_is_short_and_begins_with_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= WORDS
    first_screen = text[: text.index("\n## ")].splitlines()
    assert [line.rsplit("-m ", 1)[1].split()[0] for line in first_screen if line.startswith("    ")] == [
        "seesr_core",
        "pytest",
    ]


def test_architecture_names_what_is_there() -> None:
    """Each row of its table "Where is …?": the names of the last column stand in the files of the middle one."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = _ROW.findall(text[text.index("## Where is") :])
    assert len(rows) > 15
    for places, names in rows[2:]:
        files = [ROOT / name for name in re.findall(r"`([^`]+\.py)`", places)]
        code = "\n".join(file.read_text(encoding="utf-8") for file in files)
        missing = [name for name in re.findall(r"`(\w+)`", names) if not re.search(rf"\b{name}\b", code)]
        assert missing == [], places


def test_versions_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date, tag = re.findall(r"^## (\d[\d.]*) \(([\d-]+), tag `(.+)`\)$", changelog, re.MULTILINE)[0]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert (version, tag) == (__version__, f"v{__version__}")
    assert re.findall(r"^version: (.+)\n^date-released: (.+)$", citation, re.MULTILINE) == [(version, date)]


def test_workflows_on_the_server_call_what_the_script_knows() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    known = set(re.findall(r"^(\w+)\(\) \{$", script, re.MULTILINE))
    called = [
        part
        for file in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
        for parts in re.findall(r"run: \.ci/run ([\w ]+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        for part in parts.split()
    ]
    assert set(called) == {"lint", "fast", "host"}
    assert set(called) <= known
