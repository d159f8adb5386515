"""The plugin in a running ComfyUI: what it offers, interrupts, queues and batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from . import graph as graphs
from . import nano_graphs as nano
from .graph import only
from .locate import PLUGIN
from .server import FOLDER, Run, Server

NODES = (
    "SeeSRLoadDAPE",
    "SeeSRLoadModel",
    "SeeSRPrepareImage",
    "SeeSRExtractTags",
    "SeeSRPrompt",
    "SeeSRSoftPrompt",
    "SeeSRApply",
    "SeeSRLatentInit",
    "SeeSRScheduler",
    "SeeSRTiledSampler",
    "SeeSRTileModel",
    "SeeSRFinishImage",
    "SeeSRUpscale",
    "SeeSRGroundTags",
    "SeeSRRegionPrompt",
    "SeeSRTilePrompts",
    "SeeSRSpatialGuidance",
    "SeeSRFidelity",
    "SegSRLoadModel",
    "SegSRApply",
    "SegSRSegmentation",
)
LARGER = "seesr_larger.png"
MIRRORED = "seesr_test_mirrored.png"


@pytest.fixture(scope="module", autouse=True)
def _files(server: Server) -> None:
    nano.files_for_workflows(server.put)
    server.put("input", MIRRORED, nano.photo_bytes(mirrored=True))


@pytest.fixture(scope="module")
def anywhere(each_server: Server) -> tuple[Server, dict[str, Any]]:
    """The newest and the oldest host in turn, and what it knows about every node."""
    nano.files_for_workflows(each_server.put)
    return each_server, each_server.get("/object_info")


@pytest.fixture
def graph(object_info: dict[str, Any]) -> dict[str, Any]:
    """The full graph, small, fresh for every test."""
    return nano.full_graph(object_info)


def picture(server: Server, run: Run) -> np.ndarray:
    """The one picture of a run that must have succeeded."""
    return pictures(server, run)[0]


def pictures(server: Server, run: Run) -> list[np.ndarray]:
    """The saved pictures of a run that must have succeeded; previews are not among them."""
    assert run.status == "success", f"{run.status} at {run.node}: {run.error}"
    return [server.picture(file) for file in run.image_files() if file["type"] == "output"]


@pytest.mark.parametrize("name", NODES)
def test_node_is_offered(name: str, object_info: dict[str, Any]) -> None:
    info = object_info[name]
    assert info["category"] == "SeeSR"
    assert info["display_name"].startswith(("SeeSR", "SegSR"))
    assert len(info["description"]) > 30
    for spec in graphs.inputs_of(info):
        assert len(spec.options.get("tooltip") or "") > 10, f"{name}.{spec.name} has no tooltip"
    assert all(info["output_tooltips"])
    if "search_aliases" in object_info["KSampler"]:
        assert len(info["search_aliases"]) >= 3


def test_no_other_node_of_ours(object_info: dict[str, Any]) -> None:
    assert {name for name in object_info if name.startswith(("SeeSR", "SegSR"))} == set(NODES)


def test_templates_are_served(server: Server) -> None:
    """The template browser lists them under the plugin's folder, and asks for JSON and picture by name."""
    listed = server.get("/api/workflow_templates")[FOLDER]
    assert sorted(listed) == [path.stem for path in nano.workflow_paths()]
    for name in listed:
        assert server.get(f"/api/workflow_templates/{FOLDER}/{name}.json")["version"] == 0.4
        assert server.get_bytes(f"/api/workflow_templates/{FOLDER}/{name}.jpg")[:2] == b"\xff\xd8"


def test_models_and_photo_are_found(object_info: dict[str, Any]) -> None:
    """The small model is in the stock loaders' lists, each file in its own kind only."""
    offered = {
        (name, spec.name): spec.options.get("options") or spec.kind
        for name in ("CheckpointLoaderSimple", "SeeSRLoadDAPE", "SeeSRLoadModel", "LoadImage")
        for spec in graphs.inputs_of(object_info[name])
    }
    assert offered["CheckpointLoaderSimple", "ckpt_name"] == ["seesr-nano.safetensors"]
    assert offered["SeeSRLoadDAPE", "dape_name"] == ["dape-nano.safetensors"]
    assert offered["SeeSRLoadModel", "model_name"] == ["seesr-nano-control.safetensors"]
    assert "seesr_example.jpg" in offered["LoadImage", "image"]


def test_log_is_clean(server: Server, graph: dict[str, Any]) -> None:
    assert picture(server, server.run(graph)).shape == (128, 192, 3)
    log = server.log.read_text(errors="replace")
    assert "IMPORT FAILED" not in log
    assert "Traceback" not in log.split(FOLDER, 1)[0]


def test_missing_model_file(anywhere: tuple[Server, dict[str, Any]]) -> None:
    server, graph = anywhere[0], nano.full_graph(anywhere[1])
    graph[only(graph, "SeeSRLoadModel")]["inputs"]["model_name"] = "seesr.safetensors"
    del graph[only(graph, "PreviewAny")]  # it does not need the model, so the host would run it alone
    run = server.run(graph)
    # The oldest host does not look at the list: there the node itself says it.
    assert run.status in ("refused", "error")
    assert run.node == only(graph, "SeeSRLoadModel")
    assert "seesr.safetensors" in run.error


def test_model_file_that_vanished(anywhere: tuple[Server, dict[str, Any]]) -> None:
    """In the list when the run is queued, and no weights when it is read."""
    server, graph = anywhere[0], nano.full_graph(anywhere[1])
    server.put("models/seesr", "broken.safetensors", b"not weights at all")
    graph[only(graph, "SeeSRLoadModel")]["inputs"]["model_name"] = "broken.safetensors"
    run = server.run(graph)
    (server.base / "models/seesr/broken.safetensors").unlink()
    assert run.status == "error"
    assert run.node == only(graph, "SeeSRLoadModel")
    assert "broken.safetensors" in run.error


def test_interrupt_and_a_clean_next_run(anywhere: tuple[Server, dict[str, Any]]) -> None:
    """The same run before and after an interrupted one gives the same picture, to the bit."""
    server, object_info = anywhere
    usual = nano.full_graph(object_info)
    before = picture(server, server.run(usual))
    long = nano.full_graph(object_info, steps=1000, start_timestep=999, seed=5)
    prompt = server.submit(long)
    assert isinstance(prompt, str)
    server.wait_for(prompt, ("progress",))
    server.interrupt()
    assert server.wait(prompt, timeout=60).status == "interrupted"
    assert len(server.events(prompt, "progress")) < 1000
    server.forget()
    assert np.array_equal(picture(server, server.run(usual)), before)


def test_progress_counts_the_steps(server: Server, object_info: dict[str, Any]) -> None:
    prompt = server.submit(nano.full_graph(object_info, steps=8, start_timestep=999, seed=11))
    assert isinstance(prompt, str)
    assert server.wait(prompt).status == "success"
    assert max(event["value"] for event in server.events(prompt, "progress") if event["max"] == 8) == 8


def test_two_runs_in_the_queue(anywhere: tuple[Server, dict[str, Any]]) -> None:
    """Queued together, each gives what it gives alone."""
    server, object_info = anywhere
    queued = [server.submit(nano.full_graph(object_info, seed=seed)) for seed in (21, 22)]
    together = [picture(server, server.wait(str(prompt))) for prompt in queued]
    server.forget()
    alone = [picture(server, server.run(nano.full_graph(object_info, seed=seed))) for seed in (22, 21)][::-1]
    assert not np.array_equal(together[0], together[1])
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_batch_equals_single_runs(sampler: str, server: Server, object_info: dict[str, Any]) -> None:
    """Two photos with their own tags, soft prompts and noise: as photo by photo with seeds s and s + 1."""
    singles = []
    for seed, name in ((31, nano.PHOTO), (32, MIRRORED)):
        single = nano.full_graph(object_info, seed=seed, sampler_name=sampler, cfg=2.0)
        nano.nodes_of(single, "LoadImage")[0]["image"] = name
        singles.append(picture(server, server.run(single)))
    batch = nano.full_graph(object_info, seed=31, sampler_name=sampler, cfg=2.0)
    found = pictures(server, server.run(_both_photos(batch)))
    assert len(found) == 2
    for a, b in zip(found, singles, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_list_of_photos_of_different_sizes_runs(number: int, anywhere: tuple[Server, dict[str, Any]]) -> None:
    """Through one node and through the full graph, each photo as if alone."""
    server, object_info = anywhere
    server.put("input", LARGER, nano.photo_bytes((56, 40)))
    singles = []
    for name in (nano.PHOTO, LARGER):
        single = nano.small(graphs.to_api(nano.workflow(number), object_info))
        nano.nodes_of(single, "LoadImage")[0]["image"] = name
        singles.append(picture(server, server.run(single)))
    both = nano.small(graphs.to_api(nano.workflow(number), object_info))
    found = pictures(server, server.run(_both_photos(both, LARGER, "TestPhotoList", ("first", "second"))))
    assert [a.shape for a in found] == [a.shape for a in singles]
    assert found[0].shape != found[1].shape
    for a, b in zip(found, singles, strict=True):
        assert np.array_equal(a, b)


def _both_photos(
    graph: dict[str, Any],
    second: str = MIRRORED,
    node: str = "ImageBatch",
    names: tuple[str, str] = ("image1", "image2"),
) -> dict[str, Any]:
    """The graph with the photo and a second one, joined by a node, in place of its one photo."""
    photo = only(graph, "LoadImage")
    for other in graph.values():
        for name, value in other["inputs"].items():
            if value == [photo, 0]:
                other["inputs"][name] = ["both", 0]
    graph["second"] = {"class_type": "LoadImage", "inputs": {"image": second}}
    graph["both"] = {"class_type": node, "inputs": {names[0]: [photo, 0], names[1]: ["second", 0]}}
    return graph


def test_upscale_node_equals_the_graph(server: Server, object_info: dict[str, Any]) -> None:
    """One node and the graph of the small ones, with the same settings, give the same picture to the bit."""
    photo = {"image": "seesr_example.jpg"}
    one = graphs.to_api(nano.workflow(1), object_info)
    many = graphs.to_api(nano.workflow(2), object_info)
    for each in (one, many):
        nano.nodes_of(each, "LoadImage")[0].update(photo)
    assert np.array_equal(picture(server, server.run(one)), picture(server, server.run(many)))


def test_unpatched_model_is_untouched(server: Server, object_info: dict[str, Any]) -> None:
    """An ordinary KSampler run gives the same picture before and after SeeSR ran on the same checkpoint."""
    plain = nano.small(graphs.to_api(nano.workflow(7), object_info))
    nano.nodes_of(plain, "KSampler")[0].update(steps=5, seed=41)
    before = picture(server, server.run(plain))
    assert server.run(nano.full_graph(object_info, seed=41)).status == "success"
    nano.nodes_of(plain, "SaveImage")[0]["filename_prefix"] = "again"
    nano.nodes_of(plain, "KSampler")[0]["seed"] = 42
    assert server.run(plain).status == "success"
    nano.nodes_of(plain, "KSampler")[0]["seed"] = 41
    assert np.array_equal(picture(server, server.run(plain)), before)


def test_oldest_host_offers_every_node(oldest: Server) -> None:
    info = oldest.get("/object_info")
    assert set(NODES) <= set(info)
    assert all(spec.options.get("tooltip") for name in NODES for spec in graphs.inputs_of(info[name]))


def test_oldest_host_runs_the_quick_start_and_the_graph(oldest: Server) -> None:
    """RCA comes by hooks there instead of the patch: still the same picture from one node and from the graph."""
    info = oldest.get("/object_info")
    one = oldest.run(graphs.to_api(nano.workflow(1), info))
    many = oldest.run(graphs.to_api(nano.workflow(2), info))
    found = picture(oldest, one)
    assert found.shape == (512, 768, 3)
    assert found.std() > 10
    assert np.array_equal(found, picture(oldest, many))


def test_oldest_host_agrees_with_the_newest(oldest: Server, server: Server, graph: dict[str, Any]) -> None:
    nano.files_for_workflows(oldest.put)
    new, old = picture(server, server.run(graph)), picture(oldest, oldest.run(graph))
    assert np.abs(new.astype(int) - old.astype(int)).max() <= 2


def test_plugin_is_linked_not_copied(server: Server) -> None:
    """These tests run the working tree itself."""
    assert (server.base / "custom_nodes" / FOLDER).resolve() == PLUGIN.resolve()
