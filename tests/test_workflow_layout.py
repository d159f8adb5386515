"""How the shipped workflows look: room between nodes, wires in the open, results in sight, short notes.

Read from the files alone; that the frontend draws them so is looked at in `tests/host/test_browser.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest

from .host import graph as graphs
from .host.canvas import Box, wires_behind

WORKFLOWS = sorted((Path(__file__).parents[1] / "workflows").glob("*.json"))
CLEAR = 40
HIGH_ENOUGH = {"SaveImage": 296, "PreviewImage": 262}
"""Heights to which nodes grow when their picture comes."""
SCREEN = (1600, 900)
SIDEBAR, TABS = 60, 45
RUN_BAR = Box(1230, 45, 1600, 110)
"""Where the frontend has its own things on that screen, in pixels."""
LEAST_SCALE = 8 / 14
"""Below that the classic interface leaves texts out."""
LOADERS, EDITED, RESULTS = ("#223", "#335"), ("#432", "#653"), ("#232", "#353")
COLOURS = {
    "CheckpointLoaderSimple": LOADERS,
    "SeeSRLoadDAPE": LOADERS,
    "SeeSRLoadModel": LOADERS,
    "SegSRLoadModel": LOADERS,
    "LoraLoaderModelOnly": LOADERS,
    "ControlNetLoader": LOADERS,
    "LoadImage": EDITED,
    "SeeSRUpscale": EDITED,
    "SeeSRPrompt": EDITED,
    "PrimitiveInt": EDITED,
    "PrimitiveFloat": EDITED,
    "SaveImage": RESULTS,
    "PreviewImage": RESULTS,
    "PreviewAny": RESULTS,
}
SHARED = ("scale", "start_timestep")
"""Inputs that have to be equal wherever a workflow has them twice."""


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each shipped workflow."""
    return graphs.load(request.param)


def test_nodes_stand_clear(workflow: dict[str, Any]) -> None:
    """With the plugin's name above it, every node is 40 pixels clear of every other."""
    for a, b in permutations(workflow["nodes"], 2):
        clear = Box.of(a).clear_of(Box.of(b, badge=True))
        assert clear >= CLEAR, f"{a['type']} {a['id']} and {b['type']} {b['id']}: {clear} px"


def test_pictures_fit_their_nodes(workflow: dict[str, Any]) -> None:
    """The frontend makes a node that shows a picture at least so high, and pushes it into what stands below."""
    for node in workflow["nodes"]:
        least = HIGH_ENOUGH.get(node["type"], 0)
        assert node["size"][1] >= least, f"{node['type']} {node['id']} grows from {node['size'][1]} to {least} px"


def test_no_wire_runs_behind_a_node(workflow: dict[str, Any]) -> None:
    assert wires_behind(workflow, workflow["nodes"]) == []


def test_a_wire_behind_a_node_is_noticed() -> None:
    """Without its reroutes the full graph has many."""
    loaded = graphs.load(WORKFLOWS[[path.stem for path in WORKFLOWS].index("2_full_graph_nano")])
    del loaded["extra"]["reroutes"], loaded["extra"]["linkExtensions"]
    assert len(wires_behind(loaded, loaded["nodes"])) > 10


def test_reroutes_belong_to_links(workflow: dict[str, Any]) -> None:
    """Every reroute lists the links that pass it, and no others."""
    extra = workflow["extra"]
    reroutes = {entry["id"]: entry for entry in extra["reroutes"]}
    passing = defaultdict(set)
    for link in extra["linkExtensions"]:
        name = link["parentId"]
        while name is not None:
            passing[name].add(link["id"])
            name = reroutes[name].get("parentId")
    assert {name: set(entry["linkIds"]) for name, entry in reroutes.items()} == passing
    assert {link["id"] for link in extra["linkExtensions"]} <= {link[0] for link in workflow["links"]}


def test_result_and_run_are_in_sight(workflow: dict[str, Any]) -> None:
    """On a screen of 1600×900 a saved picture shows whole, beside the button, in letters that can be read."""
    scale, (right, down) = workflow["extra"]["ds"]["scale"], workflow["extra"]["ds"]["offset"]
    assert scale >= LEAST_SCALE
    boxes = [Box.of(node) for node in workflow["nodes"] if node["type"] == "SaveImage"]
    seen = [Box(*((at + by) * scale for at, by in zip(_sides(box), (right, down) * 2, strict=True))) for box in boxes]
    assert any(
        box.left >= SIDEBAR
        and box.top >= TABS
        and box.right <= SCREEN[0]
        and box.bottom <= SCREEN[1]
        and box.clear_of(RUN_BAR) >= 0
        for box in seen
    ), seen


def _sides(box: Box) -> tuple[float, float, float, float]:
    return box.left, box.top, box.right, box.bottom


def test_groups_do_not_overlap(workflow: dict[str, Any]) -> None:
    boxes = [Box(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]
    assert all(a.clear_of(b) >= 0 for a, b in combinations(boxes, 2))


def test_note_is_short(workflow: dict[str, Any]) -> None:
    """One note of 120 words at most; commands in it are blocks that can be copied."""
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    (text,) = note["widgets_values"]
    assert len(text.split()) <= 120
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "python -m" not in outside
    assert text.count("```") % 2 == 0


def test_colours_say_what_a_node_is_for(workflow: dict[str, Any]) -> None:
    """Loaders, what to edit, and results; every other node keeps the theme's colours."""
    for node in workflow["nodes"]:
        if node["type"] not in ("MarkdownNote", "PrimitiveStringMultiline"):
            found = node.get("color"), node.get("bgcolor")
            assert found == COLOURS.get(node["type"], (None, None)), f"{node['type']} {node['id']}"


def test_what_must_be_equal_comes_from_one_node(workflow: dict[str, Any]) -> None:
    links = {link[0]: link for link in workflow["links"]}
    for name in SHARED:
        slots = [slot for node in workflow["nodes"] for slot in node.get("inputs", ()) if slot["name"] == name]
        if len(slots) > 1:
            assert len({links[slot["link"]][1] if slot["link"] else None for slot in slots}) == 1, name
            assert all(slot["link"] for slot in slots), name
