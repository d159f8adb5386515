"""From photo to result: sizes, prompts, seeds, batches, tiles and devices' share of the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import ImageError, ResourceError, SettingsError
from seesr_core.pictures.sizes import prepare_size
from seesr_core.pipeline import Prompts, Result, SeeSRPipeline
from seesr_core.runtime.planning import count_tiles, estimate
from seesr_core.settings import UpscaleSettings
from seesr_core.tiling.runner import PictureVAE

from .tiny_model import DEFAULTS, photo, tiny_models

PHASES = ["prompts", "prepare", "encode", "sample", "decode", "finish"]


@pytest.fixture(scope="module")
def pipeline() -> SeeSRPipeline:
    return SeeSRPipeline(models=tiny_models())


def pixels(result: Result) -> np.ndarray:
    return np.asarray(result.image).astype(int)


def difference(a: Result, b: Result) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


@contextmanager
def seen_by(network: torch.nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the first input of every call."""
    shapes: list[tuple[int, ...]] = []
    hook = network.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [((16, 16), 4.0, (64, 64)), ((17, 23), 4.0, (68, 92)), ((1, 1), 4.0, (4, 4)), ((19, 16), 2.5, (48, 40))],
)
def test_the_result_is_exactly_the_photo_times_the_scale(
    pipeline: SeeSRPipeline, size: tuple[int, int], scale: float, expected: tuple[int, int]
) -> None:
    result = pipeline(photo(*size), pipeline.settings(scale=scale))
    assert (result.image.size, result.image.mode) == (expected, "RGB")
    assert result.report.sizes == prepare_size(*size, scale=scale, min_size=64)


def test_the_report_tells_tags_prompt_sizes_and_phases(pipeline: SeeSRPipeline) -> None:
    told = pipeline(photo(), pipeline.settings(prompt="ab")).report.to_dict()
    names = [tag["name"] for tag in told["tags"]]
    assert names
    assert all(0.45 < tag["score"] < 1 for tag in told["tags"])
    assert told["prompt"] == f"{', '.join(names)}, ab,clean, high-resolution, 8k"
    assert told["sizes"]["final"] == (64, 64)
    assert told["timesteps"] == [501, 1]
    assert [phase["name"] for phase in told["phases"]] == PHASES
    assert all(phase["seconds"] > 0 and phase["peak_bytes"] > 0 for phase in told["phases"])
    assert told["settings"]["start_timestep"] == DEFAULTS["start_timestep"]


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(pipeline: SeeSRPipeline) -> None:
    torch.manual_seed(1)
    first = pipeline(photo(), pipeline.settings(seed=5))
    torch.manual_seed(2)
    assert difference(first, pipeline(photo(), pipeline.settings(seed=5))) == 0
    assert difference(first, pipeline(photo(), pipeline.settings(seed=6))) > 0


def test_a_batch_equals_single_runs_with_the_next_seeds(pipeline: SeeSRPipeline) -> None:
    photos = [photo(seed=1), photo(seed=2)]
    batch = pipeline.run(photos, pipeline.settings(seed=5))
    for i, (picture, result) in enumerate(zip(photos, batch, strict=True)):
        single = pipeline(picture, pipeline.settings(seed=5 + i))
        assert difference(result, single) <= 1  # sums of another order round differently
        assert [tag.name for tag in result.report.tags] == [tag.name for tag in single.report.tags]
        assert result.report.settings.seed == 5 + i


def test_photos_of_several_sizes_are_no_batch(pipeline: SeeSRPipeline) -> None:
    with pytest.raises(ImageError, match=r"photos of one size, found \(8, 8\), \(16, 16\)"):
        pipeline.run([photo(), photo(8, 8)])
    with pytest.raises(ImageError, match="found no photos"):
        pipeline.run([])


@pytest.mark.parametrize(
    "change",
    [
        {"start": "noise"},
        {"cfg": 1.0},
        {"solver": "ddim"},
        {"color_fix": "wavelet"},
        {"use_tags": False},
        {"negative": "a b a"},
        {"control_scale": 0.0},
        {"rca_scale": 0.0},
        {"start_timestep": 501},
        {"threshold": 2.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_has_its_effect(pipeline: SeeSRPipeline, change: dict[str, Any]) -> None:
    assert difference(pipeline(photo()), pipeline(photo(), pipeline.settings(**change))) > 0


def test_without_the_lr_start_nothing_is_encoded(pipeline: SeeSRPipeline) -> None:
    with seen_by(pipeline.models.vae.encoder) as shapes:
        pipeline(photo(), pipeline.settings(start="noise"))
    assert shapes == []


def test_the_tagger_sees_the_photo_before_it_is_enlarged(
    pipeline: SeeSRPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def tagger_input(image: torch.Tensor, size: int) -> torch.Tensor:
        seen.append(tuple(image.shape))
        return image.new_zeros(len(image), 3, size, size)

    monkeypatch.setattr("seesr_core.pipeline.tagger_input", tagger_input)
    pipeline(photo(16, 20))
    assert seen == [(1, 3, 20, 16)]


def test_prompts_can_be_put_in_the_taggers_place(pipeline: SeeSRPipeline) -> None:
    settings = pipeline.settings()
    read = pipeline.read_prompts([photo()], settings)
    assert difference(pipeline(photo()), pipeline.run([photo()], prompts=read)[0]) == 0
    (without,) = pipeline.run([photo()], prompts=Prompts(tags=[[]], soft_prompt=None))
    assert without.report.prompt == ", ,clean, high-resolution, 8k"
    assert difference(pipeline(photo()), without) > 0


def test_networks_never_see_more_than_a_tile_of_a_long_photo(pipeline: SeeSRPipeline) -> None:
    settings = pipeline.settings(tile=64, overlap=16, vae_tile=128, tile_batch=2)
    calls: list[tuple[int, int]] = []
    tiled = replace(pipeline, progress=lambda done, total: calls.append((done, total)))
    with seen_by(pipeline.models.unet) as unet, seen_by(pipeline.models.vae.decoder) as decoder:
        result = tiled(photo(50, 8), settings)
    assert result.report.sizes.prepared == (400, 64)
    assert result.image.size == (200, 32)
    assert {shape[2:] for shape in unet} == {(8, 8)}
    assert max(shape[0] for shape in unet) == 4  # two tiles, each with its negative half
    assert max(shape[3] for shape in decoder) < 50
    assert result.report.tiles == count_tiles(400, 64, settings) == 8
    assert calls == [(i, 8) for i in range(1, 9)]  # 8 / 2 calls, two steps


def test_the_tiles_of_the_autoencoder_leave_no_trace(pipeline: SeeSRPipeline) -> None:
    prepared = pipeline.prepare([photo(32, 16)], pipeline.settings())
    whole = pipeline.encode(prepared, pipeline.settings())
    tiled = pipeline.encode(prepared, pipeline.settings(vae_tile=64))
    assert torch.allclose(whole, tiled, atol=1e-4)
    pair = [pipeline.decode(whole, pipeline.settings(vae_tile=side)).int() for side in (1024, 64)]
    assert (pair[0] - pair[1]).abs().max() <= 1


def test_the_autoencoder_is_given_the_range_it_was_trained_on() -> None:
    models = tiny_models()
    vae = PictureVAE(models.vae, models.device, models.dtype)
    levels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    signed = torch.tensor([-1.0, 1.0, -0.6]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    with torch.no_grad():
        expected = models.vae.encode(signed).latents
        assert torch.allclose(vae.encode(levels).latents, expected, atol=1e-5)
        picture = (models.vae.decode(expected).sample + 1) * 127.5
        assert (vae.decode(expected).sample - picture.clamp(0, 255).round()).abs().max() <= 1


def test_half_precision_networks_work_on_float32_latents() -> None:
    def half(name: str) -> Any:
        from copy import deepcopy

        return deepcopy(getattr(tiny_models(), name)).bfloat16()

    models = tiny_models(**{name: half(name) for name in ("unet", "controlnet", "vae")}, dtype=torch.bfloat16)
    pipeline = SeeSRPipeline(models=models)
    settings = pipeline.settings()
    prepared = pipeline.prepare([photo()], settings)
    z_lr = pipeline.encode(prepared, settings)
    states = pipeline.encode_text(["a", "b"])
    latent = pipeline.sample(prepared, z_lr, states, None, settings)
    assert {z_lr.dtype, states.dtype, latent.dtype} == {torch.float32}
    assert pipeline.decode(latent, settings).dtype == torch.uint8


def test_arrays_and_grey_pictures_are_taken(pipeline: SeeSRPipeline) -> None:
    grey = photo(mode="L")
    assert difference(pipeline(np.asarray(grey.convert("RGB"))), pipeline(grey)) == 0


def test_needs_grow_with_the_picture_but_the_networks_share_does_not() -> None:
    models, settings = tiny_models(), UpscaleSettings()

    def needs(*size: int) -> Any:
        return estimate(models, settings, prepare_size(*size, scale=settings.scale))

    small, wide, huge = needs(1000, 1000), needs(20000, 50), needs(10000, 10000)
    assert huge.networks == small.networks
    assert wide.networks < small.networks
    assert huge.pictures == pytest.approx(100 * small.pictures, rel=0.01)
    assert wide.pictures < 4e9 < 30e9 < huge.pictures


def test_too_little_memory_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = SeeSRPipeline(models=tiny_models())
    monkeypatch.setattr("seesr_core.runtime.memory.available_memory", lambda device=None: 10_000_000)
    with (
        seen_by(pipeline.models.unet) as calls,
        pytest.raises(ResourceError, match=r"500×400 to 2000×1600 pixels needs about \d+ MB of memory, 10 MB are"),
    ):
        pipeline(photo(500, 400))
    assert calls == []


def test_memory_that_ends_midway_is_one_sentence(pipeline: SeeSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 12 bytes")

    monkeypatch.setattr(SeeSRPipeline, "sample", exhausted)
    with pytest.raises(ResourceError, match="memory is exhausted: choose smaller tiles"):
        pipeline(photo())


def test_other_faults_keep_their_own_type(pipeline: SeeSRPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(SeeSRPipeline, "sample", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        pipeline(photo())


def test_defaults_of_the_model_come_before_the_published_ones_and_after_the_callers() -> None:
    settings = UpscaleSettings.for_model({"steps": 8, "cfg": 2.0, "start_timestep": 400}, cfg=3.0)
    assert (settings.steps, settings.cfg, settings.start_timestep, settings.tile) == (8, 3.0, 400, 768)


def test_a_start_from_noise_leaves_the_models_start_timestep() -> None:
    assert UpscaleSettings.for_model({"start_timestep": 400}, start="noise").start_timestep == 999
    with pytest.raises(SettingsError, match="start timestep must be 999, not 400"):
        UpscaleSettings.for_model({}, start="noise", start_timestep=400)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": 0}, r"scale must be from 0\.0156.* to 64, not 0"),
        ({"scale": float("nan")}, "scale must be"),
        ({"steps": 0}, "steps must be between 1"),
        ({"steps": "8"}, "wrong type"),
        ({"seed": -1}, "seed must be from 0"),
        ({"tile": 100}, "tile must be a multiple of 8"),
        ({"tile": 8}, "tile must be from 64"),
        ({"overlap": 768}, "overlap must be from 0 to 760"),
        ({"solver": "euler"}, "Unknown solver 'euler': choose one of ddpm"),
        ({"color_fix": "lab"}, "Unknown colour fix 'lab'"),
        ({"start_timestep": 1000}, "start timestep must be between 0 and 999"),
        ({"sampler": "ddpm"}, "Unknown settings sampler: expected some of"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        UpscaleSettings.for_model({}, **wrong)


def test_a_result_is_a_pil_picture(pipeline: SeeSRPipeline) -> None:
    assert isinstance(pipeline(photo()).image, Image.Image)
