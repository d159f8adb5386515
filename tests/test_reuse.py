"""What of the ControlNet serves several steps, and guidance in an interval: by counted calls and by formulas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seesr_core.errors import SettingsError
from seesr_core.method.guidance import guides
from seesr_core.method.reuse import Embeddings, StepReuse
from seesr_core.method.schedule import timesteps
from seesr_core.pictures.sizes import prepare_size
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.runtime.planning import estimate
from seesr_core.settings import UpscaleSettings

from .dape_nets import CONFIG
from .segsr_nets import tiny_segsr
from .tiny_model import tiny_models

SOFT = torch.zeros(1, 10, CONFIG.token_width)
TEXT = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pipeline() -> SeeSRPipeline:
    return SeeSRPipeline(models=tiny_models())


def sampled(pipeline: SeeSRPipeline, side: int = 64, **given: Any) -> Tensor:
    settings = pipeline.settings(**{"start_timestep": 999, "cfg": 2.0, "steps": 4, **given})
    prepared = torch.full((1, 3, side, side), 90, dtype=torch.uint8)
    with torch.no_grad():
        return pipeline.sample(prepared, torch.zeros(1, 4, side // 8, side // 8), TEXT, SOFT, settings)


@contextmanager
def calls(pipeline: SeeSRPipeline, name: str) -> Iterator[list[int]]:
    """Batch of every call of a network."""
    batches: list[int] = []
    hook = getattr(pipeline.models, name).register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    try:
        yield batches
    finally:
        hook.remove()


def test_every_nth_level_computes_and_the_levels_between_take_it() -> None:
    reuse, made = StepReuse[str](steps=2), []

    def compute(level: float, key: str) -> str:
        made.append((level, key))
        return f"{key}{level}"

    levels = (9.0, 9.0, 7.0, 5.0, 3.0, 1.0)
    found = [[reuse(level, key, lambda: compute(level, key)) for key in "ab"] for level in levels]  # noqa: B023
    assert made == [(level, key) for level in (9.0, 5.0, 1.0) for key in "ab"]
    assert found == [[f"{key}{level}" for key in "ab"] for level in (9.0, 9.0, 9.0, 5.0, 5.0, 1.0)]


def test_a_call_that_the_earlier_step_did_not_make_is_computed() -> None:
    reuse = StepReuse[str](steps=3)
    assert [reuse(3.0, "a", lambda: "old"), reuse(2.0, "b", lambda: "new"), reuse(1.0, "b", lambda: "no")] == [
        "old",
        "new",
        "new",
    ]


@contextmanager
def looks(pipeline: SeeSRPipeline) -> Iterator[list[tuple[int, ...]]]:
    """Shape of every picture that the ControlNet's image encoder was asked about."""
    shapes: list[tuple[int, ...]] = []
    first = pipeline.models.controlnet.controlnet_cond_embedding.conv_in
    hook = first.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        hook.remove()


@pytest.mark.parametrize("given", [{}, {"side": 96, "tile": 64, "overlap": 32}, {"cfg_start": 0.5}])
def test_the_image_encoder_is_asked_once_and_nothing_changes(
    pipeline: SeeSRPipeline, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for every tile, and for one half of the guidance apart from both; bit for bit the same."""
    with looks(pipeline) as once:
        kept = sampled(pipeline, **given)
    monkeypatch.setattr("seesr_core.pipeline.Embeddings", lambda: None)
    with looks(pipeline) as always:
        anew = sampled(pipeline, **given)
    assert torch.equal(kept, anew)
    kinds = {"side": 4, "cfg_start": 2}
    assert len(once) == next((kinds[name] for name in given if name in kinds), 1)
    assert len(always) == 4 * (4 if "side" in given else 1)
    assert set(once) == set(always)


def test_a_single_step_keeps_nothing(pipeline: SeeSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seesr_core.pipeline.Embeddings", lambda: pytest.fail("nothing is asked again"))
    sampled(pipeline, steps=1)


def test_embeddings_are_kept_as_far_as_there_is_room() -> None:
    """Two of three parts of 40 bytes fit into 100; what does not is left to the network from then on."""
    seen, embeddings = [], Embeddings(room=100)

    def encoder(image: Tensor) -> Tensor:
        seen.append(float(image))
        return torch.full((10,), float(image))

    for _ in range(2):
        found = [embeddings(part, torch.full((1,), part), encoder) for part in (1.0, 2.0, 3.0)]
        assert [None if one is None else float(one[0]) for one in found[:2]] == [1.0, 2.0]
    assert seen == [1.0, 2.0, 3.0]
    assert found[2] is None


def test_a_segmentation_adds_to_what_is_kept(pipeline: SeeSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """C_t changes from step to step and the embedding beneath it does not."""
    joined = SeeSRPipeline(models=tiny_models(segsr=tiny_segsr()))
    settings = joined.settings(steps=3, start_timestep=700, cfg=2.0, solver="ddim")
    z, prepared = torch.zeros(1, 4, 8, 8), torch.full((1, 3, 64, 64), 90, dtype=torch.uint8)

    def run() -> Tensor:
        return joined.sample(prepared, z, TEXT, SOFT, settings, joint=joined.join(z, SOFT, settings))

    with looks(joined) as shapes, torch.no_grad():
        kept = run()
        monkeypatch.setattr("seesr_core.pipeline.Embeddings", lambda: None)
        assert torch.equal(kept, run())
    assert len(shapes) == 1 + 3


def test_one_output_serves_two_steps_in_every_tile(pipeline: SeeSRPipeline) -> None:
    tiles = {"side": 96, "tile": 64, "overlap": 32}
    with calls(pipeline, "controlnet") as control, calls(pipeline, "unet") as unet:
        sampled(pipeline, steps=5, control_reuse=2, **tiles)
    assert (control, unet) == ([2] * 4 * 3, [2] * 4 * 5)


def test_the_residuals_are_those_of_the_step_before(pipeline: SeeSRPipeline) -> None:
    """In the second of two steps the U-Net gets exactly what the ControlNet gave in the first."""
    given: list[Tensor] = []
    hook = pipeline.models.unet.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["mid_block_additional_residual"]), with_kwargs=True
    )
    try:
        sampled(pipeline, steps=2, control_reuse=2)
        sampled(pipeline, steps=2)
    finally:
        hook.remove()
    reused, plain = given[:2], given[2:]
    assert torch.equal(reused[0], plain[0])
    assert torch.equal(reused[1], plain[0])
    assert not torch.equal(plain[1], plain[0])


def test_neutral_values_change_nothing_and_others_do(pipeline: SeeSRPipeline) -> None:
    plain = sampled(pipeline)
    assert torch.equal(sampled(pipeline, control_reuse=1, cfg_start=0.0, cfg_end=1.0), plain)
    for change in ({"control_reuse": 2}, {"cfg_start": 0.5}, {"cfg_end": 0.5}):
        assert not torch.equal(sampled(pipeline, **change), plain)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.2, 0.8), (0.0, 0.3), (0.9, 1.0)])
def test_guidance_acts_between_its_ends(pipeline: SeeSRPipeline, start: float, end: float) -> None:
    run = timesteps(10)
    expected = [2 if start <= (999 - t) / 999 <= end else 1 for t in run]
    with calls(pipeline, "unet") as batches:
        sampled(pipeline, steps=10, cfg_start=start, cfg_end=end)
    assert batches == expected
    assert UpscaleSettings(steps=10, cfg_start=start, cfg_end=end).halves() == expected


def test_both_ends_of_the_schedule_lie_in_the_whole_interval() -> None:
    assert all(guides((0.0, 1.0), t) for t in range(1000))


def test_outside_the_interval_a_step_is_that_of_cfg_1(pipeline: SeeSRPipeline) -> None:
    """Guidance from the middle on: the steps before are those of a run without guidance, until its middle."""
    seen: dict[str, list[Tensor]] = {"late": [], "none": []}
    runs: dict[str, dict[str, Any]] = {"late": {"cfg_start": 0.5}, "none": {"cfg": 1.0}}
    for name, given in runs.items():
        hook = pipeline.models.unet.register_forward_pre_hook(lambda _, args, into=seen[name]: into.append(args[0]))
        sampled(pipeline, **given)
        hook.remove()
    late, none = seen["late"], seen["none"]
    assert [len(x) for x in late] == [1, 1, 2, 2]  # at 751, 501, 251, 1
    assert all(torch.equal(a, b) for a, b in zip(late[:2], none[:2], strict=True))
    assert torch.equal(late[2], torch.cat([none[2]] * 2))
    assert not torch.equal(late[3][:1], none[3])


def test_an_output_for_one_half_is_none_for_two(pipeline: SeeSRPipeline) -> None:
    with calls(pipeline, "controlnet") as control:
        sampled(pipeline, control_reuse=4, cfg_start=0.5)
    assert control == [1, 2]


def test_what_is_kept_is_in_the_estimate(pipeline: SeeSRPipeline) -> None:
    sizes = prepare_size(1024, 1024, scale=4.0, min_size=64)
    settings = pipeline.settings(tile=64, overlap=0, vae_tile=64, control_reuse=2)
    cells, halves, tiles, channels, bytes_each = 8 * 8, 2, 64 * 64, 32, 4
    expected = cells * halves * channels * bytes_each * (80 + 6 * tiles)
    assert estimate(pipeline.models, settings, sizes).networks == expected
    assert estimate(pipeline.models, replace(settings, control_reuse=1), sizes).networks < expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"cfg_start": 0.5, "cfg_end": 0.5}, "must end after it starts"),
        ({"cfg_end": 1.5}, "cfg end must be from 0 to 1"),
        ({"control_reuse": 0}, "control reuse must be from 1 to 10"),
    ],
)
def test_bad_values_are_told(given: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        UpscaleSettings(**given)
