"""Outputs of the teacher, latents and soft prompts are made once, change no loss, and are not served for others."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from seesr_core.errors import SettingsError
from trainer.data.cache import FrozenCache
from trainer.data.crops import Crops
from trainer.data.pairs import make_crops
from trainer.data.photos import Photo, read_photos
from trainer.engine.command import get_recipe
from trainer.engine.loop import train
from trainer.stage1.command import train_dape
from trainer.stage1.recipes import STAGE1_RECIPES, Stage1Config
from trainer.stage1.task import Stage1Task
from trainer.stage2.batches import tag_prompts
from trainer.stage2.command import train_control
from trainer.stage2.recipes import Stage2Config
from trainer.stage2.task import Stage2Task

from .dape_nets import tiny_dape
from .stage2_nets import config, small_networks, write_photos
from .test_data import write_photo
from .test_stage1 import VOCABULARY
from .test_trainer_sources import write_pairs


def stage1_config(batch_size: int = 2, **changes: Any) -> Stage1Config:
    """The debug recipe, every image degraded by itself.

    Threads share out a batch, so an image's last bit depends on its neighbours: bits are compared of batches that
    return whole or hold one image.
    """
    debug = get_recipe(STAGE1_RECIPES, "debug")
    degradation = replace(debug.degradation, quantize=True)
    loop = replace(debug.loop, batch_size=batch_size)
    return replace(debug, loop=loop, degradation=degradation, degradation_group=1, **changes)


@pytest.fixture
def photos(tmp_path: Path) -> list[Photo]:
    """Four to train on and one to be shown."""
    return [write_photo(tmp_path / "photos" / f"{n}.png", (48, 40), seed=n) for n in range(5)]


def stage1_task(photos: Sequence[Photo], settings: Stage1Config, folder: Path | None = None, seed: int = 0) -> Any:
    return Stage1Task(settings, tiny_dape(seed=seed), VOCABULARY, photos, teacher_folder=folder)


def losses(task: Any, steps: int = 8) -> list[float]:
    """Losses of steps without training, dropout drawn alike."""
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        found.append(task.loss(step)[0].item())
    return found


def refuse_to_work(module: torch.nn.Module) -> None:
    """Let a network fail when it is asked for anything."""

    def fail(*_: Any) -> None:
        raise AssertionError("computed again")

    module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("way", [{"pool": 2}, {"fixed_crops": True, "batch_size": 1}], ids=["pool", "fixed_crops"])
def test_the_teacher_looks_once_and_no_loss_changes(photos: list[Photo], tmp_path: Path, way: dict[str, Any]) -> None:
    plain = losses(stage1_task(photos, stage1_config(**way)))
    settings = stage1_config(**way, cache_teacher=True)
    task = stage1_task(photos, settings, tmp_path / "teacher")
    epoch = 4 // settings.loop.batch_size  # every crop once
    assert losses(task, epoch) == plain[:epoch]
    refuse_to_work(task.teacher)
    assert losses(task) == plain
    assert task.seen.computed == 4
    task.seen.write()
    again = stage1_task(photos, settings, tmp_path / "teacher")
    refuse_to_work(again.teacher)
    assert losses(again) == plain


def test_crops_in_other_company_give_the_losses_to_rounding(photos: list[Photo]) -> None:
    plain = losses(stage1_task(photos, stage1_config(fixed_crops=True)))
    task = stage1_task(photos, stage1_config(fixed_crops=True, cache_teacher=True))
    assert losses(task) == pytest.approx(plain, rel=1e-5)
    assert task.seen.computed == 4


def test_another_teacher_or_arithmetic_is_not_served_what_is_there(
    photos: list[Photo], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = stage1_config(fixed_crops=True, cache_teacher=True)
    first = stage1_task(photos, settings, tmp_path / "teacher")
    losses(first, 2)
    first.seen.write()
    with caplog.at_level(logging.INFO):
        other = stage1_task(photos, settings, tmp_path / "teacher", seed=1)
    assert "made by another network" in caplog.text
    expected = losses(stage1_task(photos, stage1_config(fixed_crops=True), seed=1), 2)
    assert losses(other, 2) == expected
    assert other.seen.computed == 4
    other.seen.write()
    assert len(list((tmp_path / "teacher").iterdir())) == 2
    bf16 = replace(settings, loop=replace(settings.loop, precision="bf16"))
    assert stage1_task(photos, bf16, tmp_path / "teacher").seen.on_disk == {}


def test_rows_keep_the_precision_that_the_teacher_computed_in(photos: list[Photo], tmp_path: Path) -> None:
    task = stage1_task(photos, stage1_config(fixed_crops=True, cache_teacher=True), tmp_path / "teacher")
    with torch.autocast("cpu", torch.bfloat16):
        made = task._target(torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
        task.seen.write()
        task.seen.rows.clear()
        kept = task._target(torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
    assert torch.bfloat16 in {part.dtype for part in made}
    for one, other in zip(made, kept, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_damaged_shard_of_the_teacher_is_made_anew(photos: list[Photo], tmp_path: Path) -> None:
    settings = stage1_config(fixed_crops=True, cache_teacher=True)
    task = stage1_task(photos, settings, tmp_path / "teacher")
    plain = losses(task, 2)
    task.seen.write()
    (shard,) = (tmp_path / "teacher").iterdir()
    open_already = stage1_task(photos, settings, tmp_path / "teacher")
    shard.write_bytes(shard.read_bytes()[:-5])
    for damaged in (open_already, stage1_task(photos, settings, tmp_path / "teacher")):
        assert losses(damaged, 2) == plain
        assert damaged.seen.computed == 4


def test_an_interrupted_stage_1_with_the_cache_ends_as_one_without(photos: list[Photo], tmp_path: Path) -> None:
    debug = stage1_config(batch_size=1, fixed_crops=True, samples=1)
    plain = replace(debug, loop=replace(debug.loop, steps=6))
    expected = train(stage1_task(photos, plain), plain.loop, tmp_path / "plain")
    cached = replace(plain, cache_teacher=True)
    cut = replace(cached, loop=replace(cached.loop, steps=5))
    train_dape(cut, tiny_dape(), VOCABULARY, photos, tmp_path / "cached")
    assert list((tmp_path / "cached" / "teacher").iterdir())
    task = stage1_task(photos, cached, tmp_path / "cached" / "teacher")
    refuse_to_work(task.teacher)  # all four crops were seen within five steps
    task.sample = lambda folder, step: {}
    found = train(task, cached.loop, tmp_path / "cached", identity=task.identity())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_crops_that_never_return_are_not_cached(photos: list[Photo], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^cache_teacher keeps .* 4 of 4 photos are cropped anew .* fixed_crops"):
        stage1_task(photos, stage1_config(cache_teacher=True))
    square = [write_photo(tmp_path / "square" / f"{n}.png", (32, 32), seed=n) for n in range(5)]
    with pytest.raises(SettingsError, match="4 of 4 photos are cropped anew"):  # at a random scale
        stage1_task(square, stage1_config(cache_teacher=True))
    task = stage1_task(square, stage1_config(cache_teacher=True, min_scale=1.0))
    losses(task, 24)
    assert task.seen.computed <= 8  # four photos and their mirror images


def test_fixed_crops_are_the_same_in_every_epoch_and_differ_by_photo(photos: list[Photo]) -> None:
    fixed = Crops(photos, size=16, min_scale=0.5, fixed=True)
    seen: dict[int, list[torch.Tensor]] = {}
    for step in range(6):
        for crop, index in zip(*fixed.batch(step, 5), strict=True):
            seen.setdefault(index, []).append(crop)
    assert sorted(seen) == list(range(5))
    assert all(torch.equal(crop, crops[0]) for crops in seen.values() for crop in crops)
    free = Crops(photos, size=16, min_scale=0.5)
    assert len({crop.numpy().tobytes() for step in range(6) for crop in free.batch(step, 5)[0]}) == 30
    assert (fixed.varying, free.varying) == (0, 5)


def test_a_full_disk_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = FrozenCache("a", tmp_path / "file" / "below", shard_bytes=1)
    made = cache.get(["x"], lambda texts: torch.ones(len(texts), 3))
    assert "is kept in memory only" in caplog.text
    assert torch.equal(cache.get(["x"], lambda texts: torch.zeros(len(texts), 3)), made)


# Stage 2, given pairs.


def autoencoder() -> Any:
    """With a posterior to draw from; 8 pixels a latent."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        vae: Any = AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=4, **blocks)
        return vae.requires_grad_(False).eval()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A list of four pairs of 96 and 24 pixels with tags."""
    folder = write_pairs(tmp_path / "pairs", count=4, side=96)
    lines = [json.dumps({"file": f"HR/{n}.png", "lr": f"LR/{n}.png", "tags": ["a"]}) for n in range(4)]
    (folder / "list.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "list.jsonl"


def stage2_task(photos: Path, settings: Stage2Config, folder: Path | None = None, changed: str = "") -> Any:
    """Around networks of its own, one of them `changed`."""
    nets, crops = small_networks(), make_crops(read_photos(photos), settings)
    nets.vae, nets.dape = autoencoder(), deepcopy(nets.dape)
    if changed:
        next(getattr(nets, changed).parameters()).data.add_(0.1)
    return Stage2Task(settings, nets, crops, tag_prompts(crops.photos), pair_folder=folder)


def batches(task: Any, steps: int = 6) -> list[torch.Tensor]:
    """Latents and soft prompts of batches."""
    found = [task.batch(step) for step in range(steps)]
    return [part for batch in found for part in (batch.latents, batch.soft_prompt)]


def test_pairs_are_encoded_once_and_drawn_anew(pairs: Path, tmp_path: Path) -> None:
    fixed = replace(config(batch_size=1), fixed_crops=True)
    settings = replace(fixed, cache_pairs=True)
    free = stage2_task(pairs, fixed)
    plain, expected = batches(free, 12), losses(free, 6)
    task = stage2_task(pairs, settings, tmp_path / "cache")
    batches(task, 4)
    for network in (task.networks.vae.encoder, task.networks.dape.visual_encoder):
        refuse_to_work(network)
    assert all(torch.equal(one, other) for one, other in zip(batches(task, 12), plain, strict=True))
    assert losses(task, 6) == expected
    assert task.batches.seen.computed == 4
    draws = {row.numpy().tobytes() for latents in plain[::2] for row in latents}
    assert len(draws) == 12  # four crops, three times drawn from their posterior
    task.write_caches()
    again = stage2_task(pairs, settings, tmp_path / "cache")
    refuse_to_work(again.networks.vae.encoder)
    assert all(torch.equal(one, other) for one, other in zip(batches(again, 12), plain, strict=True))


def test_pairs_in_other_company_give_the_losses_to_rounding(pairs: Path) -> None:
    fixed = replace(config(), fixed_crops=True)
    plain = losses(stage2_task(pairs, fixed), 6)
    task = stage2_task(pairs, replace(fixed, cache_pairs=True))
    assert losses(task, 6) == pytest.approx(plain, rel=1e-5)
    assert task.batches.seen.computed == 4


@pytest.mark.parametrize("part", ["vae", "dape"])
def test_pairs_of_other_networks_are_not_served(pairs: Path, tmp_path: Path, part: str) -> None:
    settings = replace(config(), fixed_crops=True, cache_pairs=True)
    task = stage2_task(pairs, settings, tmp_path)
    batches(task, 2)
    task.write_caches()
    other = stage2_task(pairs, settings, tmp_path, changed=part)
    batches(other, 2)
    assert other.batches.seen.computed == 4


def test_pairs_as_large_as_the_crop_need_no_setting(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs", count=3, side=64)
    lines = [json.dumps({"file": f"HR/{n}.png", "lr": f"LR/{n}.png", "tags": ["a"]}) for n in range(3)]
    (folder / "list.jsonl").write_text("\n".join(lines), "utf-8")
    task = stage2_task(folder / "list.jsonl", replace(config(), cache_pairs=True))
    batches(task, 30)
    assert task.batches.seen.computed == 6  # three pairs and their mirror images


def test_what_pairs_cannot_be_cached_is_said(pairs: Path, tmp_path: Path) -> None:
    settings = replace(config(), cache_pairs=True)
    with pytest.raises(SettingsError, match=r"^cache_pairs keeps .* 4 of 4 photos are cropped anew each time"):
        stage2_task(pairs, settings)
    (tmp_path / "alone").mkdir()
    with pytest.raises(SettingsError, match="cache_pairs is for photos with a degraded partner"):
        stage2_task(write_photos(tmp_path / "alone"), settings)


def test_a_run_on_pairs_leaves_its_caches_and_may_go_on_without_them(pairs: Path, tmp_path: Path) -> None:
    settings = replace(config(steps=2, sample_every=0), fixed_crops=True, cache_pairs=True, cache_texts=True)
    train_control(settings, small_networks(), read_photos(pairs), tmp_path)
    assert list((tmp_path / "pairs").glob("*.safetensors"))
    assert list((tmp_path / "texts").iterdir())
    longer = replace(settings, loop=replace(settings.loop, steps=3), cache_pairs=False, cache_texts=False)
    train_control(longer, small_networks(), read_photos(pairs), tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert steps == [1, 2, 3]
