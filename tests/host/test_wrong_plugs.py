"""Wrong plugs in a running ComfyUI: each comes back as one sentence on the node that cannot go on, before sampling.

The sentence says what was expected, what came and what to do.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save

from . import graph as graphs
from . import nano_graphs as nano
from .graph import only
from .locate import plugin
from .nets import LATENT_CHANNELS
from .server import Server
from .test_dape_nodes import network, vocabulary

OTHER_DAPE = "dape-other.safetensors"


class Refusal(NamedTuple):
    """Where a wrong plug is refused, and what the sentence holds."""

    node: str
    expected: str
    came: str
    to_do: str


@pytest.fixture(scope="module")
def running(each_server: Server) -> Server:
    """The newest host, then the oldest, with the files of these tests."""
    nano.files_for_workflows(each_server.put)
    latent = {
        "latent_tensor": torch.full((1, LATENT_CHANNELS, 16, 24), float("nan")),
        "latent_format_version_0": torch.tensor([]),
    }
    each_server.put("input", "nan.latent", save(latent))
    each_server.put("models/dape", OTHER_DAPE, b"")
    path = each_server.base / "models" / "dape" / OTHER_DAPE
    plugin("seesr_core.formats.ram").write_dape(path, network(), vocabulary())
    return each_server


@pytest.fixture(scope="module")
def object_info(running: Server) -> dict[str, Any]:
    """What it knows about every node."""
    info: dict[str, Any] = running.get("/object_info")
    return info


@pytest.fixture
def graph(object_info: dict[str, Any]) -> dict[str, Any]:
    """The full graph, small, fresh for every test."""
    return nano.full_graph(object_info)


Graph = dict[str, Any]
Plug = Callable[[Graph], Refusal]


def inputs(graph: Graph, class_type: str) -> dict[str, Any]:
    """Inputs of the one node of a class; they may be changed."""
    found: dict[str, Any] = graph[only(graph, class_type)]["inputs"]
    return found


def another_prepared(graph: Graph, scale: float) -> list[Any]:
    """The output of a second SeeSR Prepare Image."""
    other = copy.deepcopy(graph[only(graph, "SeeSRPrepareImage")])
    other["inputs"]["scale"] = scale
    graph["other"] = other
    return ["other", 0]


def wrong_model(graph: Graph, class_type: str, family: str) -> str:
    """Plug a model of `family` into the node of a class; its id."""
    graph["wrong"] = {"class_type": "TestOtherModel", "inputs": {"family": family}}
    if family == "v-prediction":
        loaded = [only(graph, "CheckpointLoaderSimple"), 0]
        settings = {"model": loaded, "sampling": "v_prediction", "zsnr": False}
        graph["wrong"] = {"class_type": "ModelSamplingDiscrete", "inputs": settings}
    inputs(graph, class_type)["model"] = ["wrong", 0]
    return only(graph, class_type)


MODELS = {
    "SD15": r"is SD15 with 320 channels and text width 768",
    "SDXL": r"is SDXL with 320 channels and text width 2048",
    "SD2 inpainting": r"is an inpainting .*SD20 with 9 input channels",
    "v-prediction": r"predicts v",
}


def refusal_of_model(node: str, family: str) -> Refusal:
    """The sentence about a model of `family`."""
    made_for = r"made for seesr-nano \(a U-Net of 64 channels, text width 192, predicting noise\)"
    return Refusal(node, made_for, MODELS[family], r"load that with Load Checkpoint, or choose the SeeSR model")


def check(running: Server, graph: Graph, refusal: Refusal) -> None:
    """Run the graph, which must be refused so, before sampling."""
    run = running.run(graph)
    assert run.status == "error"
    assert run.node == refusal.node, run.error
    for part in (refusal.expected, refusal.came, refusal.to_do):
        assert re.search(part, run.error, re.DOTALL), run.error
    sentence = run.error.split(":", 1)[1].strip()
    assert "\n" not in sentence
    assert sentence.endswith((".", "!"))
    assert not re.search(r"\btensor", sentence, re.IGNORECASE)
    assert not running.events(run.prompt_id, "progress")


@pytest.mark.parametrize("family", MODELS)
def test_model_of_another_family(family: str, running: Server, graph: Graph) -> None:
    check(running, graph, refusal_of_model(wrong_model(graph, "SeeSRApply", family), family))


@pytest.mark.parametrize("family", MODELS)
def test_model_of_another_family_in_the_one_node(family: str, running: Server, object_info: dict[str, Any]) -> None:
    graph = nano.small(graphs.to_api(nano.workflow(1), object_info))
    check(running, graph, refusal_of_model(wrong_model(graph, "SeeSRUpscale", family), family))


def another_dape(graph: Graph) -> Refusal:
    inputs(graph, "SeeSRLoadDAPE")["dape_name"] = OTHER_DAPE
    return Refusal(only(graph, "SeeSRApply"), r"attends to 256", r"is 20 wide", r"choose the DAPE that belongs to it")


def latent_of_another_size(graph: Graph) -> Refusal:
    inputs(graph, "SeeSRLatentInit")["image"] = another_prepared(graph, 2.0)
    sampler = only(graph, "SeeSRTiledSampler")
    return Refusal(sampler, r"prepared image of 192 × 128", r"latent being sampled is of 96 × 64", r"connect the same")


def soft_prompt_of_another_batch(graph: Graph) -> Refusal:
    soft = inputs(graph, "SeeSRSoftPrompt")
    graph["three"] = {"class_type": "RepeatImageBatch", "inputs": {"image": soft["image"], "amount": 3}}
    soft["image"] = ["three", 0]
    return Refusal(only(graph, "SeeSRApply"), r"1 prepared images", r"soft prompts of 3 photos", r"make both from")


def nan_latent(graph: Graph) -> Refusal:
    graph["nan"] = {"class_type": "LoadLatent", "inputs": {"latent": "nan.latent"}}
    inputs(graph, "SeeSRTiledSampler")["latent_image"] = ["nan", 0]
    return Refusal(only(graph, "SeeSRTiledSampler"), r"numbers", r"NaN", r"check the node it comes from")


def sigmas_above_the_start(graph: Graph) -> Refusal:
    inputs(graph, "SeeSRScheduler")["start_timestep"] = 999
    inputs(graph, "SeeSRLatentInit")["start_timestep"] = 100
    node = only(graph, "SeeSRLatentInit")
    return Refusal(node, r"start_timestep 100", r"begin at timestep \d+", r"Give SeeSR Scheduler the same")


def no_step_left(graph: Graph) -> Refusal:
    inputs(graph, "SeeSRScheduler").update(spacing="trailing", steps=2, start_timestep=10)
    return Refusal(only(graph, "SeeSRScheduler"), r"10", r"no timestep", r"more steps|higher|raise|increase")


def prepared_at_another_scale(graph: Graph) -> Refusal:
    inputs(graph, "SeeSRFinishImage")["prepared"] = another_prepared(graph, 3.0)
    return Refusal(only(graph, "SeeSRFinishImage"), r"48×32 × 4", r"144×96 pixels, too few", r"Set the same scale")


def prompt_past_apply(graph: Graph) -> Refusal:
    encoded = inputs(graph, "SeeSRApply")["positive"]
    inputs(graph, "SeeSRTiledSampler")["positive"] = encoded
    sampler = only(graph, "SeeSRTiledSampler")
    return Refusal(
        sampler, r"MODEL comes from SeeSR Apply", r"positive conditioning .* does not", r"Connect the positive"
    )


def model_past_apply(graph: Graph) -> Refusal:
    inputs(graph, "SeeSRTiledSampler")["model"] = inputs(graph, "SeeSRApply")["model"]
    sampler = only(graph, "SeeSRTiledSampler")
    return Refusal(sampler, r"conditioning comes from SeeSR Apply", r"MODEL .* does not", r"Connect the model output")


def overlap_as_large_as_the_tile(graph: Graph) -> Refusal:
    inputs(graph, "SeeSRTiledSampler").update(tile_size=64, overlap=64)
    node = only(graph, "SeeSRTiledSampler")
    return Refusal(node, r"must be less than tile_size", r"overlap \(64 pixels\)", r"less than tile_size \(64 pixels\)")


PLUGS: list[Plug] = [
    another_dape,
    latent_of_another_size,
    soft_prompt_of_another_batch,
    nan_latent,
    sigmas_above_the_start,
    no_step_left,
    overlap_as_large_as_the_tile,
    prepared_at_another_scale,
    prompt_past_apply,
    model_past_apply,
]


@pytest.mark.parametrize("plug", PLUGS, ids=lambda plug: plug.__name__)
def test_wrong_plug(plug: Plug, running: Server, graph: Graph) -> None:
    check(running, graph, plug(graph))


def test_empty_tags_are_told_on_the_node(running: Server, graph: Graph) -> None:
    """A picture of nothing is no mistake: it is upscaled, and the node says what can be done."""
    inputs(graph, "SeeSRExtractTags")["threshold"] = 10.0
    run = running.run(graph)
    assert run.status == "success", run.error
    assert run.outputs[only(graph, "PreviewAny")]["text"] == [""]
    told = running.texts(only(graph, "SeeSRExtractTags"))[-1]
    assert re.search(r"expected at least one tag.*found none in picture 0,.*lower the threshold.*\.$", told)
