"""Workflows as the frontend saves them, turned into the form that the server runs.

Strict on purpose: an unknown node, a missing input, a widget too many or a value the schema does not know is a
`GraphError`, where the frontend would quietly carry on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

VIRTUAL = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
"""Nodes that live in the frontend alone."""
MUTED, BYPASSED = 2, 4
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
_GROWING = "COMFY_AUTOGROW_V3"
"""An input of several: the frontend saves a socket `name.part` for each."""
_COMPANION_SLOTS = ("upload",)
_SEEDS = ("seed", "noise_seed")


class GraphError(ValueError):
    """The workflow does not fit the nodes of this host."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a node as the host's `/object_info` describes it."""

    name: str
    kind: Any
    options: dict[str, Any]
    required: bool

    @property
    def is_widget(self) -> bool:
        """Whether the frontend draws a widget for it."""
        return (isinstance(self.kind, list) or self.kind in _WIDGETS) and not self.options.get("forceInput")

    @property
    def companions(self) -> int:
        """Further values that the frontend saves behind it: what to do with a seed after a run, the upload button."""
        seed = self.kind == "INT" and self.options.get("control_after_generate", self.name in _SEEDS)
        upload = any(self.options.get(key) for key in ("image_upload", "video_upload", "audio_upload"))
        return int(bool(seed or (self.kind != "INT" and self.options.get("control_after_generate")))) + int(upload)

    def accepts(self, value: Any) -> bool:
        """Whether a widget may hold this value."""
        choices = self.kind if isinstance(self.kind, list) else self.options.get("options")
        if choices is not None:
            return value in choices
        if self.kind in ("INT", "FLOAT"):
            if isinstance(value, bool) or not isinstance(value, int if self.kind == "INT" else (int, float)):
                return False
            return bool(self.options.get("min", value) <= value <= self.options.get("max", value))
        return isinstance(value, {"STRING": str, "BOOLEAN": bool}.get(str(self.kind), object))


def load(path: Path) -> dict[str, Any]:
    """A workflow file."""
    workflow: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return workflow


def save(path: Path, workflow: dict[str, Any]) -> None:
    """Write a workflow with short lists and entries on one line each, as the shipped files are written."""
    text = json.dumps(workflow, indent=2, ensure_ascii=False)
    for opening, closing, longest in (("[", "]", 160), ("{", "}", 200)):
        block = re.compile(rf"\{opening}\s+([^\[\]{{}}]{{1,{longest}}}?)\s+\{closing}")
        text = block.sub(lambda found, a=opening, b=closing: a + re.sub(r",\n\s+", ", ", found[1]) + b, text)  # type: ignore[misc]
    path.write_text(text + "\n", encoding="utf-8")


def inputs_of(info: dict[str, Any]) -> list[InputSpec]:
    """A node's inputs in the frontend's order: required first."""
    order = info.get("input_order") or {part: list(info["input"].get(part, {})) for part in ("required", "optional")}
    return [
        InputSpec(name, (entry := info["input"][part][name])[0], entry[1] if len(entry) > 1 else {}, part == "required")
        for part in ("required", "optional")
        for name in order.get(part, [])
    ]


def widget_values(node: dict[str, Any], info: dict[str, Any], *, check: bool = True) -> dict[str, Any]:
    """The node's saved values by widget name. `check` compares them with the schema's ranges and choices."""
    values, at, found = list(node.get("widgets_values") or []), 0, {}
    widgets = [spec for spec in inputs_of(info) if spec.is_widget]
    values += _newer_defaults(widgets, len(values))
    expected = sum(1 + spec.companions for spec in widgets)
    if len(values) != expected:
        raise GraphError(f"{_title(node)}: expected {expected} widget values, found {len(values)}: {values}")
    for spec in widgets:
        if check and not spec.accepts(values[at]):
            raise GraphError(f"{_title(node)}: {spec.name} = {values[at]!r} is not one of the schema's values")
        found[spec.name] = values[at]
        at += 1 + spec.companions
    return found


def _newer_defaults(widgets: list[InputSpec], saved: int) -> list[Any]:
    """Values of optional widgets that the node got after the file was saved; the frontend fills them in, too."""
    places = list(accumulate((1 + spec.companions for spec in widgets), initial=0))
    newer = [spec for spec, place in zip(widgets, places, strict=False) if place >= saved]
    if not newer or saved not in places or any(spec.required or spec.companions for spec in newer):
        return []
    return [spec.options["default"] for spec in newer]


def to_api(workflow: dict[str, Any], object_info: dict[str, Any], *, check: bool = True) -> dict[str, Any]:
    """The workflow in the server's form.

    Args:
        workflow: as saved by the frontend, format 0.4.
        object_info: the host's answer to `/object_info`.
        check: compare widget values with the schema; off for files that are not on this machine.

    Raises:
        GraphError: unknown node, missing input, wrong count of widget values, dangling link, or a refused value.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    graph: dict[str, Any] = {}
    for node in workflow["nodes"]:
        if node["type"] in VIRTUAL:
            continue
        if node["type"] not in object_info:
            raise GraphError(f"{_title(node)}: this host has no such node")
        if node.get("mode", 0) not in (MUTED, BYPASSED):
            inputs = _api_inputs(node, object_info[node["type"]], nodes, links, check)
            graph[str(node["id"])] = {
                "class_type": node["type"],
                "inputs": inputs,
                "_meta": {"title": node.get("title", node["type"])},
            }
    return graph


def nodes_of(graph: dict[str, Any], class_type: str) -> list[str]:
    """Ids of all nodes of a class, in the graph's order; graph in API form."""
    return [name for name, node in graph.items() if node["class_type"] == class_type]


def only(graph: dict[str, Any], class_type: str) -> str:
    """Id of the one node of a class; graph in API form."""
    (name,) = nodes_of(graph, class_type)
    return name


def _api_inputs(
    node: dict[str, Any], info: dict[str, Any], nodes: dict[int, Any], links: dict[int, Any], check: bool
) -> dict[str, Any]:
    inputs: dict[str, Any] = widget_values(node, info, check=check)
    specs = {spec.name: spec for spec in inputs_of(info)}
    for slot in node.get("inputs", []):
        if not _known(slot["name"], specs) and slot["name"] not in _COMPANION_SLOTS:
            raise GraphError(f"{_title(node)}: the schema has no input {slot['name']}")
        if slot.get("link") is not None:
            source = _source(slot["link"], nodes, links)
            if source is not None:
                inputs[slot["name"]] = source
    given = {name.partition(".")[0] for name in inputs}
    missing = [name for name, spec in specs.items() if spec.required and name not in given]
    if missing:
        raise GraphError(f"{_title(node)}: nothing connected to {', '.join(missing)}")
    return inputs


def _known(name: str, specs: dict[str, InputSpec]) -> bool:
    first, _, part = name.partition(".")
    return first in specs and (not part or specs[first].kind == _GROWING)


def _source(link_id: int, nodes: dict[int, Any], links: dict[int, Any]) -> Any:
    """What feeds a link: [node id, output], a primitive's value, or None behind a muted node."""
    if link_id not in links:
        raise GraphError(f"link {link_id} is not in the workflow's list")
    _, origin, output, _, _, kind = links[link_id]
    node = nodes[origin]
    if node["type"] == "PrimitiveNode":
        return node["widgets_values"][0]
    if node["type"] == "Reroute" or node.get("mode", 0) == BYPASSED:
        return _source_through(node, output, kind, nodes, links)
    return None if node.get("mode", 0) == MUTED else [str(origin), output]


def _source_through(node: dict[str, Any], output: int, kind: str, nodes: dict[int, Any], links: dict[int, Any]) -> Any:
    """A bypassed node passes on the input at the output's own place if the kinds agree, else the first of that kind."""
    slots = node.get("inputs", [])
    for slot in [*slots[output : output + 1], *slots]:
        if slot["type"] in (kind, "*"):
            return None if slot.get("link") is None else _source(slot["link"], nodes, links)
    return None


def constant(graph: dict[str, Any], value: Any) -> Any:
    """An input's value, or that of the primitive node it is linked to; graph in API form."""
    return graph[value[0]]["inputs"]["value"] if isinstance(value, list) else value


def _title(node: dict[str, Any]) -> str:
    return f"node {node['id']} ({node['type']})"
