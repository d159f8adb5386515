"""Every shipped workflow: it fits the host's nodes, its picture lies beside it, and the small model's run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from . import graph as graphs
from . import nano_graphs as nano
from .locate import plugin
from .server import Run, Server

PATHS = nano.workflow_paths()
NANO_NUMBERS = (1, 2, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14)
REAL_NUMBERS = (3, 5)
WIDTH, HEIGHT = nano.PHOTO_SIZE
AUTHORS = "https://github.com/cswry/SeeSR"
_WIDGETS = {"solver": "sampler_name"}
"""Settings in the file whose widget has another name."""


@pytest.fixture(scope="module", autouse=True)
def _files(server: Server) -> None:
    nano.files_for_workflows(server.put)


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """The sampling settings that the small model's file asks for."""
    with safe_open(nano.NANO / "seesr" / "seesr-nano-control.safetensors", "pt") as file:
        settings: dict[str, Any] = json.loads(file.metadata()["defaults"])
    return settings


def skip_on_older_hosts(number: int, info: dict[str, Any]) -> None:
    """Workflow 8 has the node in whose favour newer hosts deprecate their older one."""
    if number == 8 and "BatchImagesNode" not in info:
        pytest.skip("this host has no BatchImagesNode")


def api(number: int, info: dict[str, Any], *, wake: int | None = None) -> dict[str, Any]:
    """A workflow by number in the server's form, small; `wake` switches on nodes of that mode."""
    skip_on_older_hosts(number, info)
    loaded = nano.workflow(number)
    return nano.small(graphs.to_api(loaded if wake is None else nano.waking(loaded, wake), info))


def saved(server: Server, run: Run, graph: dict[str, Any], prefix: str) -> list[np.ndarray]:
    """The pictures of the Save Image whose prefix is this."""
    assert run.status == "success", f"{run.status} at {run.node}: {run.error}"
    for name in graphs.nodes_of(graph, "SaveImage"):
        if graph[name]["inputs"]["filename_prefix"] == prefix:
            return [server.picture(file) for file in run.image_files(name)]
    raise AssertionError(f"no Save Image with prefix {prefix}")


def assert_shows_photo(picture: np.ndarray, scale: float) -> None:
    """The right size, neither black nor flat, and plainly the photo that went in."""
    size = (round(WIDTH * scale), round(HEIGHT * scale))
    assert picture.shape == (size[1], size[0], 3)
    assert picture.std() > 10
    assert 20 < picture.mean() < 235
    assert nano.likeness(picture, nano.enlarged(size)) > 0.8


def side_by_side(server: Server, run: Run, graph: dict[str, Any]) -> np.ndarray:
    """What the compare node of a workflow shows."""
    (file,) = run.image_files(graphs.only(graph, "PreviewImage"))
    return server.picture(file)


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures of one height with the white line that the workflows draw between them."""
    return np.hstack([left, np.full((len(left), 8, 3), 255, np.uint8), right])


def test_every_workflow_has_a_number_and_a_picture() -> None:
    assert sorted(nano.number_of(path) for path in PATHS) == sorted((*NANO_NUMBERS, *REAL_NUMBERS))
    for path in PATHS:
        with Image.open(path.with_suffix(".jpg")) as picture:
            assert picture.format == "JPEG"
            assert max(picture.size) <= 1600


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_fits_the_nodes(path: Path, object_info: dict[str, Any]) -> None:
    """Nodes, inputs, links and widget values agree with the schemas; only names of files may be unknown here."""
    skip_on_older_hosts(nano.number_of(path), object_info)
    real = nano.number_of(path) in REAL_NUMBERS
    graph = graphs.to_api(graphs.load(path), object_info, check=not real)
    assert any(object_info[node["class_type"]]["output_node"] for node in graph.values())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_is_readable(path: Path) -> None:
    """A note says what it does, everything is saved as the frontend saves it; the looks: `test_workflow_layout.py`."""
    loaded = graphs.load(path)
    assert loaded["version"] == 0.4
    assert len(loaded["groups"]) >= 3
    notes = [node for node in loaded["nodes"] if node["type"] == "MarkdownNote"]
    assert any("**To change**" in note["widgets_values"][0] for note in notes)
    ours = [node for node in loaded["nodes"] if node["type"].startswith(("SeeSR", "SegSR"))]
    assert ours
    assert {node["properties"]["cnr_id"] for node in ours} == {"comfyui-seesr"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_node_is_deprecated(path: Path, object_info: dict[str, Any]) -> None:
    skip_on_older_hosts(nano.number_of(path), object_info)
    nodes = [object_info[node["type"]] for node in graphs.load(path)["nodes"] if node["type"] not in graphs.VIRTUAL]
    assert not [node["name"] for node in nodes if node.get("deprecated") or node.get("experimental")]


@pytest.mark.parametrize("number", REAL_NUMBERS)
def test_real_weights_name_their_source(number: int) -> None:
    """The base model's is one that `download` uses; where several files make one, the authors' page stands in."""
    asset = plugin("seesr_core.install.manifest").load_manifest()[{3: "base", 5: "turbo"}[number]]
    (file,) = asset.layouts["comfy"].files
    downloads = {f"https://huggingface.co/{source.repo}/resolve/main/{file.path}" for source in file.sources}
    for node in nano.workflow(number)["nodes"]:
        if node["type"] in ("CheckpointLoaderSimple", "SeeSRLoadDAPE", "SeeSRLoadModel"):
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            known = {"checkpoints": downloads, "dape": {AUTHORS}, "seesr": {AUTHORS}}
            assert model["url"] in known[model["directory"]]


@pytest.mark.parametrize("number", NANO_NUMBERS)
def test_nano_settings_are_the_files(number: int, defaults: dict[str, Any], object_info: dict[str, Any]) -> None:
    """Except where a workflow shows something else: 7 has another sampler, 9 the whole schedule, 10 guides, 13 takes
    the steps that SegSR's file asks for, 14 stands at the defaults."""
    others = {
        7: {"solver", "steps", "cfg", "start_timestep"},
        9: {"steps", "start_timestep", "spacing"},
        10: {"cfg"},
        13: {"start_timestep"},
        14: {"solver", "steps", "cfg", "start_timestep", "color_fix"},
    }
    own = others.get(number, set())
    skip_on_older_hosts(number, object_info)
    graph = graphs.to_api(nano.workflow(number), object_info, check=False)
    for setting, expected in defaults.items():
        if setting not in own:
            name = _WIDGETS.get(setting, setting)
            given = [node["inputs"][name] for node in graph.values() if name in node["inputs"]]
            found = {graphs.constant(graph, value) for value in given}
            assert found <= {expected}, f"{setting}: {found}, the file says {expected}"


@pytest.mark.parametrize("number", REAL_NUMBERS)
def test_published_settings(number: int, object_info: dict[str, Any]) -> None:
    graph = graphs.to_api(nano.workflow(number), object_info, check=False)
    names = ("steps", "cfg", "spacing", "sampler_name", "start_timestep", "color_fix")
    inputs = [entry for node in graph.values() for entry in node["inputs"].items()]
    found = {name: graphs.constant(graph, value) for name, value in inputs if name in names}
    steps, cfg, spacing = {3: (50, 5.5, "leading"), 5: (2, 1.0, "trailing")}[number]
    assert (found["steps"], found["cfg"], found["spacing"]) == (steps, cfg, spacing)
    assert (found["sampler_name"], found["start_timestep"], found["color_fix"]) == ("ddpm", 999, "adain")


def test_1_quick_start_as_shipped(server: Server, object_info: dict[str, Any]) -> None:
    """Nothing changed: the photo that comes with the plugin, at its own size."""
    graph = graphs.to_api(nano.workflow(1), object_info)
    run = server.run(graph)
    (picture,) = saved(server, run, graph, "seesr")
    assert picture.shape == (512, 768, 3)
    photo = Image.open(nano.NANO / "example.jpg").convert("RGB").resize((768, 512), Image.Resampling.BICUBIC)
    assert nano.likeness(picture, np.asarray(photo)) > 0.9
    assert any(output.get("text") for output in run.outputs.values())


def test_2_full_graph(server: Server, object_info: dict[str, Any]) -> None:
    graph = api(2, object_info)
    (picture,) = saved(server, server.run(graph), graph, "seesr")
    assert_shows_photo(picture, 4)


def test_4_tiled_by_both_ways(server: Server, object_info: dict[str, Any]) -> None:
    """Our sampler and the host's own, made tiled, agree up to rounding."""
    graph = api(4, object_info, wake=graphs.MUTED)
    run = server.run(graph)
    (ours,) = saved(server, run, graph, "seesr_large")
    (host,) = saved(server, run, graph, "seesr_large_host_sampler")
    assert_shows_photo(ours, 8)
    assert np.abs(ours.astype(int) - host.astype(int)).max() <= 1


def test_6_as_shipped_and_with_files(server: Server, object_info: dict[str, Any]) -> None:
    """The purple nodes do nothing until they are switched on; then each of the two acts."""
    plain = _picture_6(server, api(6, object_info))
    assert_shows_photo(plain, 4)
    info = server.get("/object_info")
    both = api(6, info, wake=graphs.BYPASSED)
    changed = _picture_6(server, both)
    nano.nodes_of(both, "ControlNetApplyAdvanced")[0]["strength"] = 0.0
    lora_only = _picture_6(server, both)
    nano.nodes_of(both, "LoraLoaderModelOnly")[0]["strength_model"] = 0.0
    neither = _picture_6(server, both)
    assert np.array_equal(neither, plain)
    assert not np.array_equal(lora_only, plain)
    assert not np.array_equal(changed, lora_only)


def _picture_6(server: Server, graph: dict[str, Any]) -> np.ndarray:
    (picture,) = saved(server, server.run(graph), graph, "seesr")
    return picture


def test_13_the_segmentation_is_denoised_beside_the_picture(each_server: Server) -> None:
    nano.files_for_workflows(each_server.put)
    graph = api(13, each_server.get("/object_info"))
    run = each_server.run(graph)
    (picture,) = saved(each_server, run, graph, "seesr_segsr")
    (labels,) = saved(each_server, run, graph, "seesr_segsr_labels")
    assert picture.shape == labels.shape == (4 * HEIGHT, 4 * WIDTH, 3)
    with safe_open(nano.NANO / "segsr" / "segsr-nano.safetensors", "pt") as file:
        palette = {tuple(colour) for colour in json.loads(file.metadata()["palette"])}
        steps = json.loads(file.metadata()["defaults"])
    assert {tuple(colour) for colour in labels.reshape(-1, 3).tolist()} <= palette
    scheduler = nano.nodes_of(graph, "SeeSRScheduler")[0]
    found = {name: graphs.constant(graph, scheduler[name]) for name in ("steps", "spacing", "start_timestep")}
    assert found == {name: steps[name] for name in found}


def test_7_tags_reach_the_other_graph(server: Server, object_info: dict[str, Any]) -> None:
    graph = api(7, object_info)
    nano.nodes_of(graph, "KSampler")[0]["steps"] = 10
    run = server.run(graph)
    (picture,) = saved(server, run, graph, "seesr_tags")
    assert picture.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    assert picture.std() > 10
    (shown,) = [text for output in run.outputs.values() for text in output.get("text", [])]
    assert shown.endswith("sharp photo, fine detail")
    assert "food" not in shown.split(", ")


def test_8_batch(server: Server, object_info: dict[str, Any]) -> None:
    graph = api(8, object_info)
    run = server.run(graph)
    first, second = saved(server, run, graph, "seesr_batch")
    assert_shows_photo(first, 4)
    assert_shows_photo(second[:, ::-1], 4)
    (name,) = graphs.nodes_of(graph, "PreviewAny")
    assert len(run.outputs[name]["text"]) == 2


def test_8_folder_of_different_sizes(server: Server, object_info: dict[str, Any]) -> None:
    """What the note of workflow 8 suggests, on hosts that have the node."""
    if "LoadImageDataSetFromFolder" not in object_info:
        pytest.skip("this host has no node that loads a folder")
    for name, size in (("a.png", (48, 32)), ("b.png", (32, 32))):
        server.put("input/photos", name, nano.photo_bytes(size))
    graph = api(8, server.get("/object_info"))
    graph["folder"] = {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": "photos"}}
    nano.nodes_of(graph, "SeeSRUpscale")[0]["image"] = ["folder", 0]
    pictures = saved(server, server.run(graph), graph, "seesr_batch")
    assert [picture.shape for picture in pictures] == [(128, 192, 3), (128, 128, 3)]


def test_9_lre_on_and_off(server: Server, object_info: dict[str, Any]) -> None:
    """One side is the usual graph, the other is what the host's own sampling nodes make of pure noise."""
    graph = api(9, object_info)
    for sampler in nano.nodes_of(graph, "SeeSRTiledSampler"):
        sampler["tile_size"] = 768  # as shipped: the host's sampler knows no tiles
    run = server.run(graph)
    (on,) = saved(server, run, graph, "seesr_lre_on")
    (off,) = saved(server, run, graph, "seesr_lre_off")
    assert not np.array_equal(on, off)
    assert np.array_equal(side_by_side(server, run, graph), beside(off, on))

    usual = nano.full_graph(object_info, steps=10, spacing="leading", start_timestep=999, tile_size=768)
    assert np.array_equal(on, saved(server, server.run(usual), usual, "seesr")[0])
    stock = _off_by_stock_nodes(graph)
    assert np.array_equal(off, saved(server, server.run(stock), stock, "seesr_lre_off")[0])


def _off_by_stock_nodes(graph: dict[str, Any]) -> dict[str, Any]:
    """The side without LRE, its sampler replaced by the host's."""
    (name,) = (
        name
        for name in graphs.nodes_of(graph, "SeeSRTiledSampler")
        if graph[graph[name]["inputs"]["noise"][0]]["class_type"] == "RandomNoise"
    )
    given = graph[name]["inputs"]
    guider = {key: given[key] for key in ("model", "positive", "negative", "cfg")}
    sampler = {key: given[key] for key in ("noise", "sampler", "sigmas", "latent_image")}
    on_side = [other for other in graphs.nodes_of(graph, "SaveImage") if "_on" in _prefix(graph, other)]
    compare = [*graphs.nodes_of(graph, "ImageStitch"), *graphs.nodes_of(graph, "PreviewImage")]
    kept = {key: node for key, node in graph.items() if key not in (*on_side, *compare)}
    return kept | {
        "guider": {"class_type": "CFGGuider", "inputs": guider},
        name: {"class_type": "SamplerCustomAdvanced", "inputs": {**sampler, "guider": ["guider", 0]}},
    }


def _prefix(graph: dict[str, Any], name: str) -> str:
    return str(graph[name]["inputs"]["filename_prefix"])


def test_10_regions_and_the_plain_run(server: Server, object_info: dict[str, Any]) -> None:
    """Regions and guidance change the picture; at their neutral values it is the plain one, bit for bit."""
    graph = api(10, object_info)
    run = server.run(graph)
    (bound,), (plain,) = (saved(server, run, graph, f"seesr_{name}") for name in ("regions", "plain"))
    assert_shows_photo(bound, 4)
    assert not np.array_equal(bound, plain)
    assert np.array_equal(side_by_side(server, run, graph), beside(plain, bound))
    (where,) = saved(server, run, graph, "seesr_grounding")
    assert where.shape[1] / where.shape[0] == pytest.approx(WIDTH / HEIGHT, rel=0.02)
    nano.nodes_of(graph, "SeeSRRegionPrompt")[0]["strength"] = 0.0
    nano.nodes_of(graph, "SeeSRSpatialGuidance")[0]["outside"] = 1.0
    run = server.run(graph)
    (neutral,), (again,) = (saved(server, run, graph, f"seesr_{name}") for name in ("regions", "plain"))
    assert np.array_equal(neutral, again)
    assert np.array_equal(again, plain)


def test_10_with_a_mask_painted_by_hand(server: Server, object_info: dict[str, Any]) -> None:
    """The mask editor saves what was painted as transparency; Load Image gives it as MASK."""
    photo = Image.open(io.BytesIO(nano.photo_bytes())).convert("RGBA")
    painted = Image.new("L", photo.size, 255)
    painted.paste(0, (0, 0, photo.width // 2, photo.height))
    photo.putalpha(painted)
    file = io.BytesIO()
    photo.save(file, "PNG")
    server.put("input", "painted.png", file.getvalue())
    graph = api(10, server.get("/object_info"))
    nano.nodes_of(graph, "LoadImage")[0]["image"] = "painted.png"
    mask = [graphs.only(graph, "LoadImage"), 1]
    nano.nodes_of(graph, "SeeSRRegionPrompt")[0].update(tags="food", masks=mask)
    nano.nodes_of(graph, "SeeSRSpatialGuidance")[0]["mask"] = mask
    run = server.run(graph)
    (bound,), (plain,) = (saved(server, run, graph, f"seesr_{name}") for name in ("regions", "plain"))
    assert_shows_photo(bound, 4)
    assert not np.array_equal(bound, plain)


def test_11_gives_2048_pixels(object_info: dict[str, Any]) -> None:
    """As shipped: a square of the photo, sixteen times larger, in three by three tiles."""
    graph = graphs.to_api(nano.workflow(11), object_info)
    (cut,), (finish,) = nano.nodes_of(graph, "ImageScale"), nano.nodes_of(graph, "SeeSRFinishImage")
    scale = graphs.constant(graph, finish["scale"])
    assert (cut["width"] * scale, cut["height"] * scale) == (2048, 2048)


def test_11_prompts_per_tile(server: Server, object_info: dict[str, Any]) -> None:
    graph = api(11, object_info)
    run = server.run(graph)
    (picture,), (grid,) = (saved(server, run, graph, f"seesr_{name}") for name in ("tile_prompts", "tile_grid"))
    whole = nano.enlarged((16 * WIDTH, 16 * HEIGHT))
    left = 16 * (WIDTH - HEIGHT) // 2
    assert picture.shape == grid.shape == (16 * HEIGHT, 16 * HEIGHT, 3)
    assert nano.likeness(picture, whole[:, left : left + 16 * HEIGHT]) > 0.8
    assert (grid != picture).any(axis=2).mean() > 0.01


def test_12_more_fidelity_is_nearer_to_the_photo(server: Server, object_info: dict[str, Any]) -> None:
    graph = api(12, object_info)
    run = server.run(graph)
    pictures = [saved(server, run, graph, f"seesr_fidelity_{name}")[0] for name in ("0", "50", "100")]
    photo = nano.enlarged((4 * WIDTH, 4 * HEIGHT)).astype(float)
    errors = [np.square(picture - photo).mean() for picture in pictures]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[2]
    usual = nano.full_graph(object_info)
    assert np.array_equal(pictures[0], saved(server, server.run(usual), usual, "seesr")[0])


def test_14_takes_its_one_step_from_the_model_s_file(server: Server, object_info: dict[str, Any]) -> None:
    """Its widgets stand at the published values, and the result is that of the small model's own."""
    pictures = []
    for number, prefix in ((14, "seesr_one_step"), (1, "seesr")):
        graph = api(number, object_info)
        pictures += saved(server, server.run(graph), graph, prefix)
    assert_shows_photo(pictures[0], 4)
    assert np.array_equal(pictures[0], pictures[1])
