"""The user interface itself: workflows opened by drag and drop, run with the button, help pages read."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from . import graph as graphs
from . import nano_graphs as nano
from .browser import Page, browser_page, chromium
from .server import FOLDER, Server

pytestmark = pytest.mark.browser
REAL_NUMBERS = (3, 5)


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: `$SEESR_SCREENSHOTS`, else pytest's own folder (`--basetemp` names it)."""
    named = os.environ.get("SEESR_SCREENSHOTS")
    return Path(named) if named else tmp_path_factory.mktemp("screenshots")


@pytest.fixture(scope="module")
def page(server: Server, shots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One tab for all tests of this file."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    if chromium() is None:
        pytest.skip("no chromium on PATH or at $SEESR_CHROMIUM")
    nano.files_for_workflows(server.put)
    with browser_page(server.url, tmp_path_factory.mktemp("profile"), shots) as opened:
        yield opened


def meaning(saved: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """What a workflow computes, and where it shows it."""
    graph = graphs.to_api(saved, info, check=False)
    places = {str(node["id"]): (node.get("title"), node["pos"]) for node in saved["nodes"] if str(node["id"]) in graph}
    return {name: (node["class_type"], node["inputs"], places[name]) for name, node in graph.items()}


@pytest.mark.parametrize("path", nano.workflow_paths(), ids=lambda path: path.stem)
def test_workflow_opens_cleanly(path: Path, page: Page, object_info: dict[str, Any]) -> None:
    """Every node known and large enough for its widgets; no message, except that real weights are missing."""
    saved = page.drop(path)
    page.shoot(path.stem)
    for node in page.nodes():
        assert node["known"], f"missing node {node['type']}"
        assert node["size"][0] >= node["least"][0] - 1, node
        assert node["size"][1] >= node["least"][1] - 1, node
    assert meaning(saved, object_info) == meaning(graphs.load(path), object_info)
    complaints = page.complaints()
    if nano.number_of(path) in REAL_NUMBERS:
        assert any("3 errors found" in text for text in complaints), "the missing models are not offered"
    else:
        assert not complaints


def test_unknown_node_is_noticed(page: Page, tmp_path: Path) -> None:
    """The check above can fail: a node that nobody has is reported as missing."""
    loaded = nano.workflow(1)
    next(node for node in loaded["nodes"] if node["type"] == "SeeSRUpscale")["type"] = "SeeSRNobodyHasThis"
    path = tmp_path / "unknown.json"
    graphs.save(path, loaded)
    page.drop(path)
    page.shoot("negative_control_unknown_node")
    assert not all(node["known"] for node in page.nodes())
    assert page.complaints()


def test_missing_models_name_their_source(page: Page) -> None:
    """A file of one piece is offered for download. The tagger and SeeSR are published in several: no such offer."""
    page.drop(next(nano.WORKFLOWS.glob("3_*.json")))
    page.tab.get_by_text("View details").first.click()
    page.tab.wait_for_timeout(1500)
    page.shoot("missing_models")
    shown = page.tab.locator("[data-testid=missing-model-importable-rows]").inner_text().split("\n")
    base = ["512-base-ema.safetensors", "checkpoints", "Download"]
    assert shown == [*base, "dape.safetensors", "dape", "seesr.safetensors", "seesr"]
    page.tab.get_by_label("Toggle properties panel").last.click()  # the host remembers it for the next page


def test_quick_start_from_template_to_picture(page: Page, server: Server) -> None:
    """Template browser, Run, and a saved picture on the node."""
    page.tab.reload(wait_until="commit")
    page.open()
    page.tab.keyboard.press("Escape")
    page.tab.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.tab.get_by_text(FOLDER).first.click()
    page.tab.wait_for_timeout(2500)
    page.shoot("template_browser")
    page.tab.get_by_text("1_quick_start_nano").last.click()  # the first may be a tab behind
    page.tab.wait_for_function("() => app.graph._nodes.some(n => n.type === 'SeeSRUpscale')", polling=300)
    page.tab.wait_for_timeout(1500)
    before = set((server.base / "output").glob("seesr_*.png"))
    page.run_to_picture()
    page.shoot("quick_start_after_run")
    (made,) = set((server.base / "output").glob("seesr_*.png")) - before
    picture = np.asarray(Image.open(made).convert("RGB"))
    assert picture.shape == (512, 768, 3)
    assert picture.std() > 10
    assert not page.complaints()


def small(number: int, folder: Path) -> Path:
    """A workflow for the tiny photo, as a file to drop."""
    path = folder / next(nano.WORKFLOWS.glob(f"{number}_*.json")).name
    graphs.save(path, nano.small_saved(nano.workflow(number)))
    return path


@pytest.mark.parametrize(
    ("number", "prefixes", "size"),
    [
        (10, ("seesr_regions", "seesr_plain", "seesr_grounding"), (192, 128)),
        (11, ("seesr_tile_prompts", "seesr_tile_grid"), (512, 512)),
        (12, ("seesr_fidelity_0", "seesr_fidelity_50", "seesr_fidelity_100"), (192, 128)),
    ],
)
def test_run_button_to_saved_pictures(
    number: int, prefixes: tuple[str, ...], size: tuple[int, int], page: Page, server: Server, tmp_path: Path
) -> None:
    """Dropped, run with the button, every picture saved and shown."""
    page.drop(small(number, tmp_path))
    output = server.base / "output"
    before = set(output.glob("*.png"))
    page.run_to_picture()
    page.shoot(f"{number}_after_run")
    made = {path.name.rpartition("_0")[0]: path for path in set(output.glob("*.png")) - before}
    assert sorted(made) == sorted(prefixes)
    with Image.open(made[prefixes[0]]) as picture:
        assert picture.size == size
        assert np.asarray(picture).std() > 10
    assert not page.complaints()


SHOWN = {2: "seesr", 10: "seesr_regions", 11: "seesr_tile_prompts", 12: "seesr_fidelity_100", 13: "seesr_segsr"}


def picture_of(server: Server, graph: dict[str, Any], prefix: str) -> np.ndarray:
    """The picture that a graph in the server's form saves under a prefix."""
    run = server.run(graph)
    assert run.status == "success", run.error
    (name,) = (
        name for name in graphs.nodes_of(graph, "SaveImage") if graph[name]["inputs"]["filename_prefix"] == prefix
    )
    return server.picture(run.image_files(name)[0])


@pytest.mark.parametrize(
    ("number", "kinds"),
    [(10, ("SeeSRRegionPrompt", "SeeSRSpatialGuidance")), (11, ("SeeSRTilePrompts",)), (12, ("SeeSRFidelity",))],
)
def test_inside_a_subgraph_nothing_changes(
    number: int, kinds: tuple[str, ...], page: Page, server: Server, tmp_path: Path
) -> None:
    """The frontend sends a subgraph's nodes one by one, under names with a colon; the picture is the flat graph's."""
    page.drop(small(number, tmp_path))
    flat = page.prompt()
    page.into_subgraph(kinds)
    inside = page.prompt()
    moved = [name for kind in kinds for name in graphs.nodes_of(inside, kind)]
    assert len(moved) == sum(len(graphs.nodes_of(flat, kind)) for kind in kinds)
    assert all(":" in name for name in moved), "they are not in a subgraph"
    expected = picture_of(server, flat, SHOWN[number])
    server.forget()
    assert np.array_equal(picture_of(server, inside, SHOWN[number]), expected)


def without_titles(graph: dict[str, Any]) -> dict[str, Any]:
    """What a graph in the server's form computes."""
    return {name: (node["class_type"], node["inputs"]) for name, node in graph.items()}


def as_the_tests_bypass(saved: dict[str, Any], kind: str, info: dict[str, Any]) -> dict[str, Any]:
    """The graph in the server's form by the tests' own way from a saved workflow, all nodes of a kind bypassed."""
    for node in saved["nodes"]:
        if node["type"] == kind:
            node["mode"] = graphs.BYPASSED
    return graphs.to_api(saved, info, check=False)


@pytest.mark.parametrize(
    ("number", "kind", "neutral"),
    [
        (2, "SeeSRApply", {"strength": 0.0, "rca_strength": 0.0}),
        (10, "SeeSRSpatialGuidance", {"outside": 1.0}),
        (12, "SeeSRFidelity", {"fidelity": 0.0}),
    ],
)
def test_bypassed_they_leave_the_model_alone(
    number: int, kind: str, neutral: dict[str, float], page: Page, server: Server, object_info: Any, tmp_path: Path
) -> None:
    """MODEL and prompts pass through; the picture is that of the node at its neutral values."""
    dropped = small(number, tmp_path)
    page.drop(dropped)
    graph = page.prompt()
    changed = picture_of(server, graph, SHOWN[number])
    for inputs in nano.nodes_of(graph, kind):
        inputs.update(neutral)
    page.bypass(kind)
    bypassed = page.prompt()
    assert not graphs.nodes_of(bypassed, kind)
    assert without_titles(bypassed) == without_titles(as_the_tests_bypass(graphs.load(dropped), kind, object_info))
    found = picture_of(server, bypassed, SHOWN[number])
    assert np.array_equal(found, picture_of(server, graph, SHOWN[number]))
    assert not np.array_equal(found, changed)


@pytest.mark.parametrize(
    ("number", "kind", "missing"),
    [
        (10, "SeeSRRegionPrompt", "positive"),
        (11, "SeeSRTilePrompts", "positive"),
        (2, "SeeSRSoftPrompt", "soft_prompt"),
        (2, "SeeSRLatentInit", "noise"),
    ],
)
def test_bypassed_without_a_stand_in_they_are_missed_in_words(
    number: int, kind: str, missing: str, page: Page, server: Server, tmp_path: Path
) -> None:
    """No input of theirs can stand for what they give: the host says what is missing and runs what does without."""
    page.drop(small(number, tmp_path))
    page.bypass(kind)
    assert f"Required input is missing: {missing}" in server.refusals(page.prompt())


@pytest.mark.parametrize("name", ["SeeSRUpscale", "SeeSRApply"])
def test_help_page_opens(name: str, page: Page) -> None:
    """The page that the node's help button shows, with its picture loaded."""
    page.drop(next(nano.WORKFLOWS.glob("1_*.json" if name == "SeeSRUpscale" else "2_*.json")))
    page.tab.evaluate(
        "(name) => { const node = app.graph._nodes.find(n => n.type === name); app.canvas.selectNode(node); }", name
    )
    page.tab.locator("[data-testid=info-button]").click()
    page.tab.wait_for_timeout(3000)
    page.shoot(f"help_{name}")
    shown = page.tab.evaluate("() => document.querySelector('.node-help-content')?.innerText || ''")
    assert "Tips" in shown
    assert "Browse templates" in shown
    loaded = "() => [...document.querySelectorAll('.node-help-content img')].map(i => i.naturalWidth)"
    assert min(page.tab.evaluate(loaded)) > 100
