"""Make the pictures beside the workflows and in the help pages again, with the small model as it is now.

    python -m tools.pictures [NUMBER …] [--settings] [--screens]

Runs every workflow that the small model can run (or those numbered), as shipped, in a ComfyUI server of its own, which
takes some minutes, and writes `workflows/*.jpg` and `web/docs/images/*.jpg`. `--settings` first copies the sampling
settings in the small model's file into its workflows. `--screens` also takes the help pages' screenshots (needs
playwright and chromium).
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from tests.host import graph as graphs
from tests.host import nano_graphs as nano
from tests.host.browser import browser_page
from tests.host.locate import PLUGIN, host_folder
from tests.host.server import Server

log = logging.getLogger("pictures")

HELP = PLUGIN / "web" / "docs" / "images"
QUALITY = 88
_WIDGETS = {"solver": "sampler_name", "steps": "steps", "cfg": "cfg", "start_timestep": "start_timestep"}
_OWN = {
    7: set(_WIDGETS.values()),
    9: {"steps", "start_timestep"},
    10: {"cfg"},
    13: {"start_timestep"},
    14: {*_WIDGETS.values(), "color_fix"},
}
"""Settings by which a workflow shows something else than the small model's own, or leaves them at their defaults."""
NANO_NUMBERS = (1, 2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14)
_HELP_PICTURES = {1: "upscale", 4: "tiles", 10: "regions", 11: "tile_prompts", 12: "fidelity", 13: "segsr"}
"""Workflows whose picture a help page shows, too. SeeSR Latent Init's is put together of two of the command line's:
workflow 9 runs the whole schedule, where the small model gives grain on either side."""
UNFLATTERING = ("mild", "strong", "text")
"""Photos in `tools/photos`: mildly degraded, strongly degraded architecture, and text."""
STAND_INS = {3: 2, 5: 2}
"""Workflows for weights that are not here show what the small model makes of the same graph."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description="Make the workflows' pictures.")
    parser.add_argument("numbers", type=_number, nargs="*", metavar="NUMBER", help="default: all")
    parser.add_argument("--settings", action="store_true", help="first take the settings from the small model's file")
    parser.add_argument("--screens", action="store_true", help="also take the screenshots of the help pages")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    host = host_folder()
    if host is None:
        parser.error("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(host, Path(folder))
        try:
            server.start()
            info = server.get("/object_info")
            if options.settings:
                copy_settings(info)
            make_pictures(server, info, options.numbers or NANO_NUMBERS)
            if not options.numbers:
                make_before_after(server)
            if options.screens:
                take_screens(server, Path(folder) / "browser")
        finally:
            server.stop()


def _number(text: str) -> int:
    """A workflow that the small model can run."""
    if text not in map(str, NANO_NUMBERS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(map(str, NANO_NUMBERS))}, not {text}")
    return int(text)


def copy_settings(info: dict[str, Any]) -> None:
    """Write the small model's sampling settings into the workflows that run it."""
    with safe_open(nano.NANO / "seesr" / "seesr-nano-control.safetensors", "pt") as file:
        given = json.loads(file.metadata()["defaults"])
    settings = {_WIDGETS.get(name, name): value for name, value in given.items()}
    for number in NANO_NUMBERS:
        path = next(nano.WORKFLOWS.glob(f"{number}_*.json"))
        loaded = graphs.load(path)
        for node in loaded["nodes"]:
            if node["type"] in info:
                _set(node, info[node["type"]], {k: v for k, v in settings.items() if k not in _OWN.get(number, set())})
        _set_primitives(loaded, info)
        graphs.save(path, loaded)


def _set_primitives(loaded: dict[str, Any], info: dict[str, Any]) -> None:
    """Give every primitive node the value of the widgets that it feeds."""
    nodes = {node["id"]: node for node in loaded["nodes"]}
    for _, origin, _, target, slot, _ in loaded["links"]:
        entry = nodes[target]["inputs"][slot]
        if nodes[origin]["type"] in ("PrimitiveInt", "PrimitiveFloat") and entry["name"] in _WIDGETS.values():
            values = graphs.widget_values(nodes[target], info[nodes[target]["type"]], check=False)
            nodes[origin]["widgets_values"][0] = values[entry["name"]]


def _set(node: dict[str, Any], info: dict[str, Any], settings: dict[str, Any]) -> None:
    at = 0
    for spec in graphs.inputs_of(info):
        if spec.is_widget and at < len(node["widgets_values"]):
            node["widgets_values"][at] = settings.get(spec.name, node["widgets_values"][at])
            at += 1 + spec.companions


def make_pictures(server: Server, info: dict[str, Any], numbers: Sequence[int]) -> None:
    """Run the workflows and write what each shows."""
    HELP.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture = _LAYOUTS.get(number, _before_and_after)(_run(server, number, info))
        paths = [next(nano.WORKFLOWS.glob(f"{n}_*.json")).with_suffix(".jpg") for n in (number, *_standing_in(number))]
        paths += [HELP / f"{_HELP_PICTURES[number]}.jpg"] if number in _HELP_PICTURES else []
        for path in paths:
            picture.save(path, quality=QUALITY, optimize=True)
            log.info("%s %s", path.relative_to(PLUGIN), picture.size)


def _standing_in(number: int) -> list[int]:
    """Workflows whose picture is that of `number`."""
    return [other for other, shown in STAND_INS.items() if shown == number]


def _run(server: Server, number: int, info: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """The saved pictures of a workflow by their prefix."""
    graph = graphs.to_api(nano.workflow(number), info)
    run = server.run(graph, timeout=3600)
    if run.status != "success":
        raise SystemExit(f"workflow {number}: {run.status} at node {run.node}: {run.error}")
    return {
        graph[name]["inputs"]["filename_prefix"]: [server.picture(file) for file in run.image_files(name)]
        for name in graphs.nodes_of(graph, "SaveImage")
    }


def _split(left: Image.Image, right: Image.Image, longest: int = 960) -> Image.Image:
    """Left half of one picture and right half of another, a white line between."""
    middle = right.width // 2
    both = right.copy()
    both.paste(left.crop((0, 0, middle, left.height)), (0, 0))
    both.paste("white", (middle - 2, 0, middle + 2, right.height))
    both.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return both


def _photo(size: tuple[int, int]) -> Image.Image:
    return Image.open(nano.NANO / "example.jpg").convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _before_and_after(pictures: dict[str, list[np.ndarray]]) -> Image.Image:
    (picture,) = next(iter(pictures.values()))
    result = Image.fromarray(picture)
    return _split(_photo(result.size), result)


def _batch(pictures: dict[str, list[np.ndarray]]) -> Image.Image:
    """The photo and the mirrored photo, one above the other."""
    first, second = (Image.fromarray(picture) for picture in pictures["seesr_batch"])
    mirrored = _photo(second.size).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rows = [_split(_photo(first.size), first), _split(mirrored, second)]
    both = Image.new("RGB", (rows[0].width, rows[0].height + rows[1].height + 4), "white")
    both.paste(rows[0], (0, 0))
    both.paste(rows[1], (0, rows[0].height + 4))
    return both


def _off_and_on(pictures: dict[str, list[np.ndarray]]) -> Image.Image:
    (off,), (on,) = pictures["seesr_lre_off"], pictures["seesr_lre_on"]
    return _split(Image.fromarray(off), Image.fromarray(on))


def _regions(pictures: dict[str, list[np.ndarray]]) -> Image.Image:
    """Where the tags are; beside it the plain run (left half) and the one with regions."""
    (where,), (plain,), (bound,) = (pictures[f"seesr_{name}"] for name in ("grounding", "plain", "regions"))
    result = _split(Image.fromarray(plain), Image.fromarray(bound), longest=720)
    return _row([Image.fromarray(where).resize(result.size, Image.Resampling.LANCZOS), result])


def _tile_prompts(pictures: dict[str, list[np.ndarray]]) -> Image.Image:
    """Left the tiles and what they read, right the result."""
    both = [Image.fromarray(pictures[f"seesr_{name}"][0]) for name in ("tile_grid", "tile_prompts")]
    for picture in both:
        picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
    return _row(both)


def _fidelity(pictures: dict[str, list[np.ndarray]]) -> Image.Image:
    """The same part of the three results, magnified twice, each with its number."""
    parts: list[Image.Image] = []
    for name, number in (("0", "0"), ("50", "0.5"), ("100", "1")):
        picture = Image.fromarray(pictures[f"seesr_fidelity_{name}"][0])
        left, top = (picture.width - 208) // 2, (picture.height - 260) // 2
        part = picture.crop((left, top, left + 208, top + 260)).resize((416, 520), Image.Resampling.LANCZOS)
        ImageDraw.Draw(part).text(
            (10, 8), number, "white", ImageFont.load_default(28), stroke_width=2, stroke_fill="black"
        )
        parts.append(part)
    return _row(parts)


def _segsr(pictures: dict[str, list[np.ndarray]]) -> Image.Image:
    """The degraded scene, the result and its segmentation."""
    result, labels = (Image.fromarray(pictures[f"seesr_segsr{name}"][0]) for name in ("", "_labels"))
    scene = Image.open(nano.NANO / "example_scene.png").convert("RGB")
    size = (2 * result.width, 2 * result.height)
    return _row([picture.resize(size, Image.Resampling.NEAREST) for picture in (scene, result, labels)])


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height side by side, a white line between."""
    row = Image.new("RGB", (sum(p.width + 4 for p in pictures) - 4, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + 4
    row.thumbnail((1280, 1280), Image.Resampling.LANCZOS)
    return row


_LAYOUTS: dict[int, Callable[[dict[str, list[np.ndarray]]], Image.Image]] = {
    8: _batch,
    9: _off_and_on,
    10: _regions,
    11: _tile_prompts,
    12: _fidelity,
    13: _segsr,
}


def make_before_after(server: Server) -> None:
    """Three photos that flatter nobody, plainly enlarged and upscaled by workflow 1: `before_after.jpg`."""
    rows = []
    for name in UNFLATTERING:
        path = Path(__file__).parent / "photos" / f"{name}.png"
        server.put("input", path.name, path.read_bytes())
        graph = graphs.to_api(nano.workflow(1), server.get("/object_info"), check=False)
        nano.nodes_of(graph, "LoadImage")[0]["image"] = path.name
        run = server.run(graph, timeout=3600)
        if run.status != "success":
            raise SystemExit(f"{path.name}: {run.status} at node {run.node}: {run.error}")
        result = Image.fromarray(server.picture(run.image_files(graphs.only(graph, "SaveImage"))[0]))
        rows.append(pair_of(name, Image.open(path).convert("RGB"), result))
    stack(rows).save(nano.NANO / "before_after.jpg", quality=QUALITY, optimize=True)


def pair_of(name: str, photo: Image.Image, result: Image.Image) -> Image.Image:
    """A photo, plainly enlarged and named, beside its result."""
    plain = photo.resize(result.size, Image.Resampling.BICUBIC)
    ImageDraw.Draw(plain).text((8, 6), name, "white", ImageFont.load_default(20), stroke_width=2, stroke_fill="black")
    return _row([plain, result])


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width below each other, a white line between."""
    whole = Image.new("RGB", (rows[0].width, sum(row.height + 4 for row in rows) - 4), "white")
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height + 4
    return whole


def take_screens(server: Server, folder: Path) -> None:
    """The graph of workflow 2, and the tags in workflow 7, as they look on the canvas after a run."""
    with browser_page(server.url, folder / "profile", folder) as page:
        page.hide_map()
        for number, name, groups in ((2, "graph", 5), (7, "tags", 2)):
            page.drop(next(nano.WORKFLOWS.glob(f"{number}_*.json")))
            page.run_to_picture()
            page.wait(8)  # until the host's notice of the finished run has gone
            shot = Image.open(page.shoot(name)).convert("RGB").crop(page.box_of_groups(groups))
            shot.thumbnail((1280, 1280), Image.Resampling.LANCZOS)
            shot.save(HELP / f"{name}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
