"""A real browser on the running host: drop a workflow on the canvas, look for complaints, run it, take pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_READY = "() => window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 300 && window.app?.graph"
_DROP = """([name, text]) => {
    const canvas = document.querySelector('#graph-canvas'), data = new DataTransfer();
    data.items.add(new File([text], name + '.json', {type: 'application/json'}));
    for (const kind of ['dragenter', 'dragover', 'drop'])
        canvas.dispatchEvent(new DragEvent(kind, {
            bubbles: true, cancelable: true, dataTransfer: data, clientX: 900, clientY: 500}));
}"""
_NODES = """() => app.graph._nodes.map(node => ({
    type: node.type, known: !!node.constructor.nodeData || LiteGraph.registered_node_types[node.type] !== undefined,
    size: [...node.size], least: [...node.computeSize()]}))"""
_ALL_SAVED = """() => app.graph._nodes.filter(node => node.type === 'SaveImage' && node.mode === 0)
    .every(node => app.nodeOutputs[node.id]?.images?.length)"""  # node.imgs is set when the node is first drawn
_BYPASS = "(type) => app.graph._nodes.filter(n => n.type === type).forEach(n => { n.mode = 4; })"
_INTO_SUBGRAPH = (
    "(types) => { app.graph.convertToSubgraph(new Set(app.graph._nodes.filter(n => types.includes(n.type)))); }"
)
_COMPLAINTS = """() => [...document.querySelectorAll('.p-toast-message, .p-dialog, [role=dialog], [role=alert], *')]
    .filter(each => each.matches('.p-toast-message-error, .p-toast-message-warn, .p-dialog')
        || (each.children.length < 3 && /^(\\d+ errors? found|Missing Node|Error)/i.test(each.innerText || '')
            && each.offsetParent !== null))
    .map(each => each.innerText.slice(0, 300))"""


def chromium() -> str | None:
    """The browser's program; None if there is none."""
    named = os.environ.get("SEESR_CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """The host's user interface in one tab."""

    def __init__(self, tab: Any, url: str, shots: Path) -> None:
        """`tab` is playwright's page; screenshots go to `shots`."""
        self.tab, self.url, self.shots = tab, url, shots

    def open(self) -> None:
        """Load the interface and close what it shows to newcomers."""
        self.tab.goto(self.url, wait_until="commit")
        self.tab.wait_for_function(_READY, polling=500)
        self.tab.wait_for_timeout(3000)
        self.tab.keyboard.press("Escape")
        self.tab.wait_for_timeout(500)

    def drop(self, path: Path) -> dict[str, Any]:
        """Drop a workflow file on the canvas; what the frontend would save of it."""
        text = path.read_text(encoding="utf-8")
        self.tab.evaluate(_DROP, [path.stem, text])
        self.tab.wait_for_function(
            "(types) => JSON.stringify(app.graph._nodes.map(n => n.type).sort()) === types",
            arg=json.dumps(sorted(node["type"] for node in json.loads(text)["nodes"]), separators=(",", ":")),
            polling=300,
        )
        self.tab.wait_for_timeout(3000)
        saved: dict[str, Any] = json.loads(self.tab.evaluate("() => JSON.stringify(app.graph.serialize())"))
        return saved

    def nodes(self) -> list[dict[str, Any]]:
        """Type, size and least size of every node on the canvas, and whether the frontend knows it."""
        found: list[dict[str, Any]] = self.tab.evaluate(_NODES)
        return found

    def complaints(self) -> list[str]:
        """Texts of error messages and dialogs in sight."""
        found: list[str] = self.tab.evaluate(_COMPLAINTS)
        return found

    def run_to_picture(self) -> None:
        """Press Run and wait until every Save Image node that runs, in sight or not, has its picture."""
        if self.tab.locator("[data-testid=dialog-overlay]").count():  # a slow machine shows the templates late
            self.tab.keyboard.press("Escape")
            self.tab.wait_for_timeout(500)
        self.tab.locator("[data-testid=queue-button]").click()
        self.tab.wait_for_function(_ALL_SAVED, polling=500)
        self.tab.wait_for_timeout(1500)

    def prompt(self) -> dict[str, Any]:
        """What the Run button would send, in the server's form."""
        found: dict[str, Any] = self.tab.evaluate("async () => (await app.graphToPrompt()).output")
        return found

    def bypass(self, type_: str) -> None:
        """Switch all nodes of this type to bypass, as Ctrl+B does."""
        self.tab.evaluate(_BYPASS, type_)

    def into_subgraph(self, types: Sequence[str]) -> None:
        """Put all nodes of these types into one subgraph."""
        self.tab.evaluate(_INTO_SUBGRAPH, list(types))

    def hide_map(self) -> None:
        """Close the small map in the corner."""
        self.tab.locator("[data-testid=close-minimap-button]").click()

    def wait(self, seconds: float) -> None:
        """Let the interface settle."""
        self.tab.wait_for_timeout(1000 * seconds)

    def box_of_groups(self, count: int) -> tuple[int, int, int, int]:
        """Where the first groups of the graph are on the screen: left, top, right, bottom."""
        boxes = self.tab.evaluate(
            """(count) => app.graph._groups.slice(0, count).map(group => {
            const [x, y, w, h] = group._bounding, {scale, offset} = app.canvas.ds;
            const box = app.canvas.canvas.getBoundingClientRect();
            return [box.x + (x + offset[0]) * scale, box.y + (y + offset[1]) * scale, w * scale, h * scale];
        })""",
            count,
        )
        return (
            round(min(x for x, *_ in boxes)),
            round(min(y for _, y, *_ in boxes)),
            round(max(x + w for x, _, w, _ in boxes)),
            round(max(y + h for _, y, _, h in boxes)),
        )

    def shoot(self, name: str) -> Path:
        """A screenshot."""
        self.shots.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=str(self.shots / f"{name}.png"))
        return self.shots / f"{name}.png"


@contextmanager
def browser_page(url: str, profile: Path, shots: Path) -> Iterator[Page]:
    """A tab with a fresh profile on the interface at `url`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=chromium(),
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1920, "height": 1080},
        )
        tab = context.new_page()
        tab.set_default_timeout(240_000)
        page = Page(tab, url, shots)
        page.open()
        yield page
        context.close()
