"""Help pages, translations and the registry's description agree with the nodes as the host sees them."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from . import graph as graphs
from .locate import PLUGIN
from .server import FOLDER, Server

OURS = ("SeeSR", "SegSR")
"""How the names of our nodes begin."""
LANGUAGES = ("en", "zh", "zh-TW", "ja", "ko", "fr", "de", "es", "ru")
DOCS = PLUGIN / "web" / "docs"
PAGES = {"en": "{}.md", "zh": "{}/zh.md"}
"""The English page lies where the frontend looks for any language that has no page of its own."""
_UNSAFE = re.compile(r"[@{}|]")
"""Characters with a meaning in the frontend's message format."""


@pytest.fixture(scope="module")
def nodes(object_info: dict[str, Any]) -> dict[str, Any]:
    """Our nodes."""
    return {name: info for name, info in object_info.items() if name.startswith(OURS)}


def definitions(language: str) -> dict[str, Any]:
    """A language's node titles, inputs, outputs and tooltips."""
    found: dict[str, Any] = json.loads((PLUGIN / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    return found


def texts(tree: Any) -> list[str]:
    """All strings in a nested dictionary."""
    return [tree] if isinstance(tree, str) else [text for value in tree.values() for text in texts(value)]


def test_these_languages() -> None:
    assert {path.name for path in (PLUGIN / "locales").iterdir()} == set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_locale_covers_exactly_the_nodes(language: str, nodes: dict[str, Any]) -> None:
    found = definitions(language)
    assert set(found) == set(nodes)
    for name, info in nodes.items():
        assert set(found[name]) == {"display_name", "description", "inputs", "outputs"}
        assert list(found[name]["inputs"]) == [spec.name for spec in graphs.inputs_of(info)]
        assert list(found[name]["outputs"]) == [str(i) for i in range(len(info["output"]))]
        entries = [*found[name]["inputs"].values(), *found[name]["outputs"].values()]
        assert all(set(entry) == {"name", "tooltip"} and all(entry.values()) for entry in entries)


@pytest.mark.parametrize("language", LANGUAGES)
def test_locale_is_safe_to_format(language: str) -> None:
    assert not [text for text in texts(definitions(language)) if _UNSAFE.search(text)]


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_locale_is_translated(language: str) -> None:
    """No description or tooltip was left in English."""
    english = {text for text in texts(definitions("en")) if " " in text and not text.startswith(OURS)}
    assert not english & set(texts(definitions(language)))


def test_english_is_what_the_nodes_say(nodes: dict[str, Any]) -> None:
    found = definitions("en")
    for name, info in nodes.items():
        assert (found[name]["display_name"], found[name]["description"]) == (info["display_name"], info["description"])
        for spec in graphs.inputs_of(info):
            assert found[name]["inputs"][spec.name] == {"name": spec.name, "tooltip": spec.options["tooltip"]}
        for i, (label, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True)):
            assert found[name]["outputs"][str(i)] == {"name": label, "tooltip": tooltip}


def test_host_serves_the_translations(server: Server, nodes: dict[str, Any]) -> None:
    served = server.get("/api/i18n")
    for language in LANGUAGES:
        assert set(nodes) <= set(served[language]["nodeDefs"])
        assert served[language]["nodeCategories"]["SeeSR"] == "SeeSR"


@pytest.mark.parametrize("language", PAGES)
def test_help_page_of_every_node(language: str, server: Server, nodes: dict[str, Any]) -> None:
    """Served where the frontend asks; the table names the inputs in their order, picture and workflow exist."""
    for name, info in nodes.items():
        path = PAGES[language].format(name)
        page = server.get_bytes(f"/extensions/{FOLDER}/docs/{path}").decode()
        assert page == (DOCS / path).read_text(encoding="utf-8")
        rows = re.findall(r"^\| `(\w+)`.*\|", page, re.MULTILINE)
        assert rows == [spec.name for spec in graphs.inputs_of(info)] + info["output_name"], name
        (picture,) = re.findall(r"!\[.+\]\((\S+)\)", page)
        assert server.get_bytes(f"/extensions/{FOLDER}/docs/{picture}")[:2] == b"\xff\xd8"
        (shown,) = re.findall(r"`(\d+_\w+)`", page.rsplit("##", 1)[1])
        assert (PLUGIN / "workflows" / f"{shown}.json").is_file()


def test_linked_workflow_has_the_node(nodes: dict[str, Any]) -> None:
    for name in nodes:
        page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        shown = re.findall(r"`(\d+_\w+)`", page)[-1]
        kinds = [node["type"] for node in graphs.load(PLUGIN / "workflows" / f"{shown}.json")["nodes"]]
        assert name in kinds, f"{shown} does not show {name}"


def test_pages_and_pictures_are_all_used(nodes: dict[str, Any]) -> None:
    files = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.is_file()}
    pages = {pattern.format(name) for pattern in PAGES.values() for name in nodes}
    pictures = {
        picture
        for page in pages
        for picture in re.findall(r"!\[.+\]\((\S+)\)", (DOCS / page).read_text(encoding="utf-8"))
    }
    assert files == pages | pictures
    for picture in pictures:
        with Image.open(DOCS / picture) as image:
            assert image.width <= 1280
        assert Path(DOCS / picture).stat().st_size < 200_000


def test_comfy_cli_accepts_it(tmp_path: Path) -> None:
    """What `comfy node publish` would check first; needs `pip install comfy-cli`."""
    command = shutil.which("comfy")
    if command is None:
        pytest.skip("comfy-cli is not installed")
    found = subprocess.run(
        [command, "--skip-prompt", "--no-enable-telemetry", "node", "validate"],
        cwd=PLUGIN,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    assert "All validation checks passed" in found.stdout + found.stderr


def test_registry_description(host: Path) -> None:
    """The host's own parser reads `[tool.comfy]`, and nothing that the registry needs is empty."""
    pytest.importorskip("pydantic_settings")
    config = importlib.import_module("comfy_config.config_parser").extract_node_configuration(str(PLUGIN))
    assert config.project.name == FOLDER
    assert config.project.description
    assert config.project.supported_comfyui_version == ">=0.3.64"
    assert config.tool_comfy.publisher_id == "seesr"
    assert config.tool_comfy.display_name == "SeeSR"
    assert config.tool_comfy.web is None, "WEB_DIRECTORY serves the help under the folder's name"
