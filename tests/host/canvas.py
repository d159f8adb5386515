"""How the frontend draws a workflow: the boxes of its nodes and the curves of its wires, from the file alone.

All in canvas units, y downwards. A node's `pos` is the corner below its title.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Point = tuple[float, float]
TITLE, BADGE = 30.0, 24.0
"""Height of a node's title, and of the plugin's name above it in the classic interface."""
_SLOT, _ROW, _FIRST_ROW = 20.0, 24.0, 36.0
"""Rows of sockets and of widgets; where the first widget's middle lies in a node without sockets."""
_CURVE, _MOST_CURVE = 0.25, 20.0
"""A curve's control points lie this share of its length away; at a reroute at most so far."""
_SAMPLES = 24


@dataclass(frozen=True, slots=True)
class Box:
    """What a node covers, with its title."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def of(cls, node: dict[str, Any], *, badge: bool = False) -> Box:
        """A node's box; with `badge` also what the plugin's name above it takes."""
        (x, y), (width, height) = node["pos"], node["size"]
        return cls(x, y - TITLE - badge * BADGE, x + width, y + height)

    def holds(self, point: Point) -> bool:
        """Whether a point lies inside."""
        return self.left < point[0] < self.right and self.top < point[1] < self.bottom

    def clear_of(self, other: Box) -> float:
        """Free pixels between the two boxes, along the axis that has more of them; negative if they overlap."""
        return max(other.left - self.right, self.left - other.right, other.top - self.bottom, self.top - other.bottom)


def output_at(node: dict[str, Any], slot: int) -> Point:
    """Where a wire leaves a node."""
    return node["pos"][0] + node["size"][0], node["pos"][1] + (slot + 0.7) * _SLOT


def input_at(node: dict[str, Any], slot: int) -> Point:
    """Where a wire enters a node: a socket of its own, or a widget's row."""
    x, y = node["pos"]
    entries = node["inputs"]
    sockets = [at for at, entry in enumerate(entries) if "widget" not in entry]
    if "widget" not in entries[slot]:
        return x, y + (sockets.index(slot) + 0.7) * _SLOT
    rows = max(len(sockets), len(node.get("outputs", ())))
    row = [at for at, entry in enumerate(entries) if "widget" in entry].index(slot)
    return x, y + _FIRST_ROW + (rows - 1) * _SLOT * (rows > 0) + row * _ROW


def wires(workflow: dict[str, Any]) -> Iterator[tuple[list[Any], list[Point]]]:
    """Every link with points along its curve, through its reroutes."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    extra = workflow.get("extra", {})
    parents = {entry["id"]: entry["parentId"] for entry in extra.get("linkExtensions", ())}
    reroutes = {entry["id"]: entry for entry in extra.get("reroutes", ())}
    chains = {link[0]: _chain(parents.get(link[0]), reroutes) for link in workflow["links"]}
    ends = {link[0]: input_at(nodes[link[3]], link[4]) for link in workflow["links"]}
    starts = {link[0]: output_at(nodes[link[1]], link[2]) for link in workflow["links"]}
    tangents = _tangents(reroutes, chains, starts, ends)
    for link in workflow["links"]:
        places = [tuple(reroutes[name]["pos"]) for name in chains[link[0]]]
        points = [starts[link[0]], *places, ends[link[0]]]
        directions = [(1.0, 0.0), *(tangents[name] for name in chains[link[0]]), (1.0, 0.0)]
        yield link, list(_curve(points, directions))


def _chain(last: int | None, reroutes: dict[int, Any]) -> list[int]:
    """Reroutes from a link's origin to its target."""
    chain: list[int] = []
    while last is not None:
        chain.insert(0, last)
        last = reroutes[last].get("parentId")
    return chain


def _tangents(
    reroutes: dict[int, Any], chains: dict[int, list[int]], starts: dict[int, Point], ends: dict[int, Point]
) -> dict[int, Point]:
    """The direction in which wires pass each reroute: half way between how they come and how they go on, on average."""
    found: dict[int, Point] = {}
    for name, entry in reroutes.items():
        here, leaving, before = tuple(entry["pos"]), [], (0.0, 0.0)
        for link in entry["linkIds"]:
            chain = chains[link]
            at = chain.index(name)
            before = tuple(reroutes[chain[at - 1]]["pos"]) if at else starts[link]
            after = tuple(reroutes[chain[at + 1]]["pos"]) if at + 1 < len(chain) else ends[link]
            leaving.append(math.atan2(after[1] - here[1], after[0] - here[0]))
        coming = math.atan2(here[1] - before[1], here[0] - before[0])
        turn = (coming - sum(leaving) / len(leaving)) / 2
        turn += math.pi * (abs(turn) > math.pi / 2)
        found[name] = math.cos(coming - turn), math.sin(coming - turn)
    return found


def _curve(points: list[Point], directions: list[Point]) -> Iterator[Point]:
    """Points on the cubic curves from place to place."""
    whole = len(points) == 2
    for (a, b), (going, coming) in zip(pairwise(points), pairwise(directions), strict=True):
        length = _CURVE * math.dist(a, b)
        first, last = a is points[0], b is points[-1]
        near = length if whole or first else min(length, _MOST_CURVE)
        far = length if whole or last else min(length, _MOST_CURVE)
        controls = (a[0] + near * going[0], a[1] + near * going[1]), (b[0] - far * coming[0], b[1] - far * coming[1])
        for i in range(_SAMPLES + 1):
            t = i / _SAMPLES
            w = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            yield tuple(sum(u * p[axis] for u, p in zip(w, (a, *controls, b), strict=True)) for axis in (0, 1))  # type: ignore[misc]


def wires_behind(workflow: dict[str, Any], nodes: Iterable[dict[str, Any]]) -> list[str]:
    """Wires of which some part lies behind one of `nodes`, their own ends' included, in words."""
    boxes = [(node, Box.of(node)) for node in nodes]
    named = {node["id"]: node for node in workflow["nodes"]}
    found = []
    for link, points in wires(workflow):
        for node, box in boxes:
            if any(box.holds(point) for point in points):
                ends = " → ".join(f"{named[link[at]]['type']} {link[at]}" for at in (1, 3))
                found.append(f"{ends} ({link[5]}) runs behind {node['type']} {node['id']}")
    return found
