"""Fine-tuning of weights that exist: adapters on the ControlNet, and the recipes for it through the command line."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from seesr_core.cli.main import main as cli
from seesr_core.errors import DataError, SettingsError, WeightsError
from seesr_core.formats.base import Base
from seesr_core.formats.control import ControlParts, read_control, write_control
from seesr_core.model_files import NANO_FOLDER, GivenFiles, find_model
from seesr_core.models import load_models
from trainer.capacity.dry_run import dry_run
from trainer.engine.adapters import add_lora, merge_lora
from trainer.engine.settings import overridden, read_toml
from trainer.stage2 import command as stage2
from trainer.stage2.command import train_control
from trainer.stage2.networks import Networks, build_networks
from trainer.stage2.recipes import Stage2Config
from trainer.stage2.task import Stage2Task

from .small_nets import inputs, seeded_networks
from .stage2_nets import config, small_networks, small_task, write_photos
from .tiny_model import networks, write_tiny_model

RECIPES = {
    "rca": ("finetune-24gb",),
    "lora": ("finetune-24gb", "--trained", "lora", "--lora-rank", "4"),
    "turbo": ("turbo",),
}
SAMPLING = {"turbo": {"steps": 4, "cfg": 1.0}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def lora_config(**loop: Any) -> Stage2Config:
    return replace(config(**loop), trained="lora", lora_rank=2)


def adapted(settings: Stage2Config, shift: float = 0.0) -> Networks:
    """The tiny model's networks as weights to start from, those of the ControlNet moved by `shift`."""
    nets = small_networks()
    nets.controlnet.conv_in.weight.data.add_(shift)
    start = ControlParts.from_modules(nets.unet, nets.controlnet, base="tiny")
    parts = {"vae": nets.vae, "text_encoder": nets.text_encoder, "tokenizer": nets.tokenizer}
    base = Base(unet_config=start.unet_config, unet_state=networks()["unet"].state_dict(), scheduler={}, **parts)
    return build_networks(base, deepcopy(nets.dape), settings, start)


def residuals(controlnet: Any) -> list[torch.Tensor]:
    given = inputs()
    soft = {"soft_prompt": given["soft"]}
    with torch.no_grad():
        down, mid = controlnet(
            given["x"], 500, given["text"], given["image"], cross_attention_kwargs=soft, return_dict=False
        )
    return [*down, mid]


def test_adapters_change_nothing_at_first_and_merge_into_the_layers() -> None:
    _, controlnet = seeded_networks()
    before, names = residuals(controlnet), list(controlnet.state_dict())
    linear = [m for name, m in controlnet.named_modules() if isinstance(m, nn.Linear) and "attentions." in name]
    add_lora(controlnet, 3)
    assert all(torch.equal(one, other) for one, other in zip(residuals(controlnet), before, strict=True))
    learning = {name: p for name, p in controlnet.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert sum(p.numel() for p in learning.values()) == sum(3 * (m.in_features + m.out_features) for m in linear)
    assert any("image_attentions" in name for name in learning)
    with torch.no_grad():
        for number, parameter in enumerate(learning.values()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    changed = residuals(controlnet)
    assert not torch.allclose(changed[-1], before[-1], atol=1e-3)
    merge_lora(controlnet)
    assert list(controlnet.state_dict()) == names
    for one, other in zip(residuals(controlnet), changed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    merge_lora(controlnet)
    assert list(controlnet.state_dict()) == names


def test_lora_trains_adapters_and_the_image_encoder_and_is_planned_so(photos: Path) -> None:
    settings = lora_config()
    nets = adapted(settings)
    assert not any(p.requires_grad for p in nets.unet.parameters())
    kinds = {"lora_" in name or name.startswith("controlnet_cond_embedding.") for name in _learning(nets.controlnet)}
    assert kinds == {True}
    crops = small_task(photos).batches.crops
    found = dry_run(Stage2Task(settings, nets, crops, ["a,"] * len(crops)), settings.loop)
    assert found.trained == sum(p.numel() for p in nets.controlnet.parameters() if p.requires_grad)
    assert found.memory["gradients"] == 4 * found.trained
    assert found.checkpoint == 12 * found.trained
    whole = sum(p.numel() for net in (small_networks().unet, small_networks().controlnet) for p in net.parameters())
    others = sum(p.numel() for net in (nets.vae, nets.text_encoder, nets.dape) for p in net.parameters())
    adapters = sum(p.numel() for name, p in nets.controlnet.named_parameters() if "lora_" in name)
    assert found.trained + found.frozen == whole + others + adapters


def _learning(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def test_adapters_are_not_trained_sharded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, crops = lora_config(), small_task(photos).batches.crops
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match=r"ddp\.yaml"):
        Stage2Task(settings, adapted(settings), crops, ["a,"] * len(crops))


def test_an_interrupted_run_of_adapters_ends_as_an_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    listed = small_task(photos).photos
    settings = lora_config(steps=4, sample_every=0, save_every=1, ema=0.5)
    whole = train_control(settings, adapted(settings), listed, tmp_path / "whole")
    cut = replace(settings, loop=replace(settings.loop, steps=2))
    train_control(cut, adapted(cut), listed, tmp_path / "cut")
    resumed = train_control(settings, adapted(settings), listed, tmp_path / "cut")
    one, other = (read_control(path).controlnet_state for path in (whole, resumed))
    assert one.keys() == other.keys() == small_networks().controlnet.state_dict().keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = adapted(config()).controlnet.half().state_dict()
    moved = {name for name in one if not torch.equal(one[name], start[name])}
    assert any("image_attentions" in name for name in moved)
    assert any(name.startswith("controlnet_cond_embedding") for name in moved)
    assert all("attentions." in name or name.startswith("controlnet_cond_embedding") for name in moved)


def test_a_run_does_not_go_on_around_other_weights(photos: Path, tmp_path: Path) -> None:
    listed, settings = small_task(photos).photos, lora_config(steps=1, sample_every=0)
    train_control(settings, adapted(settings), listed, tmp_path)
    longer = replace(settings, loop=replace(settings.loop, steps=2))
    with pytest.raises(DataError, match=r"other settings \(init: "):
        train_control(longer, adapted(longer, shift=0.1), listed, tmp_path)
    with pytest.raises(DataError, match=r"other settings \(lora_rank: 2 -> 3\)"):
        train_control(replace(longer, lora_rank=3), adapted(replace(longer, lora_rank=3)), listed, tmp_path)


@pytest.mark.parametrize("trained", ["lora", "rca-image-encoder"])
def test_a_part_of_nothing_cannot_be_trained(trained: Any) -> None:
    nets = small_networks()
    parts = {"vae": nets.vae, "text_encoder": nets.text_encoder, "tokenizer": nets.tokenizer}
    base = Base(unet_config=dict(nets.unet.config), unet_state={}, scheduler={}, **parts)
    with pytest.raises(SettingsError, match=rf"trained '{trained}' goes on from weights .* --init"):
        build_networks(base, nets.dape, replace(config(), trained=trained))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('trained = "lroa"', r"trained should be one of all, rca-image-encoder, image-encoder, lora, found 'lroa'"),
        ("lora_rank = 0", r"lora_rank must be at least 1, found 0"),
        ("lora_rnak = 4", r"there is no setting lora_rnak\. Did you mean lora_rank\?"),
        ("cache_pair = true", r"there is no setting cache_pair\. Did you mean cache_pairs\?"),
        ("fixed_crops = 1", r"fixed_crops should be true or false, found 1"),
    ],
)
def test_a_mistake_in_the_settings_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text, "utf-8")
    with pytest.raises(SettingsError, match=message):
        overridden(config(), read_toml(tmp_path / "mine.toml"), tmp_path / "mine.toml")


def arguments(model: Path, photos: Path, out: Path, recipe: str, *more: str, init: bool = True) -> list[str]:
    """The recipe's command on small networks, with as many images and steps as a test has time for."""
    start = ["--init", str(model / "seesr.safetensors")] if init else []
    files = ["--base", model / "tiny.safetensors", "--dape", model / "dape.safetensors", "--data", photos, "--out", out]
    small = "--crop 64 --smallest-photo 64 --loop.batch-size 2 --loop.accumulation 1 --loop.optimizer adamw-fused"
    often = "--loop.log-every 1 --loop.save-every 1 --loop.sample-every 100 --loop.warmup 1 --loop.device cpu"
    return ["--recipe", recipe, *map(str, files), *start, *small.split(), *often.split(), *more]


def logged(out: Path) -> dict[int, float]:
    lines = (out / "log.jsonl").read_text("utf-8").splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_run_and_resume(tiny: Path, photos: Path, tmp_path: Path, name: str) -> None:
    for out, steps in (("whole", "2"), ("cut", "1"), ("cut", "2")):
        assert stage2.main(arguments(tiny, photos, tmp_path / out, *RECIPES[name], "--loop.steps", steps)) == 0
    assert sorted(logged(tmp_path / "whole")) == [1, 2]
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")
    one, other = (read_control(tmp_path / out / "seesr-control.safetensors") for out in ("whole", "cut"))
    start = read_control(tiny / "seesr.safetensors")
    assert one.controlnet_state.keys() == start.controlnet_state.keys()
    assert one.rca_state.keys() == start.rca_state.keys()
    for name_, tensor in one.controlnet_state.items():
        assert torch.equal(tensor, other.controlnet_state[name_])
    assert one.recipe == RECIPES[name][0]
    assert one.defaults == {**start.defaults, **SAMPLING.get(name, {})}


@pytest.mark.parametrize("flags", [(), ("--validation-steps", "3", "--validation-start", "249")])
def test_an_export_has_the_sampling_settings_of_its_start_with_those_that_are_given(
    tiny: Path, photos: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    start = read_control(tiny / "seesr.safetensors")
    brought = {"steps": 4, "cfg": 1.0, "solver": "ddim", "start_timestep": 251}
    write_control(tmp_path / "tuned.safetensors", replace(start, defaults=brought))
    given = arguments(tiny, photos, tmp_path / "run", "finetune-24gb", "--loop.steps", "1", *flags)
    given[given.index(str(tiny / "seesr.safetensors"))] = str(tmp_path / "tuned.safetensors")
    assert stage2.main(given) == 0
    expected = {**brought, "steps": 3, "start_timestep": 249} if flags else brought
    assert read_control(tmp_path / "run" / "seesr-control.safetensors").defaults == expected
    assert load_models(tiny, given=GivenFiles(control=tmp_path / "run")).defaults == expected


@pytest.mark.slow
def test_the_debug_recipe_takes_the_embedded_files_and_its_run_upscales(photos: Path, tmp_path: Path) -> None:
    folder, small, large = tmp_path / "run", tmp_path / "small.png", tmp_path / "large.png"
    given = ["--recipe", "debug", "--data", str(photos.parent), "--out", str(folder), "--loop.steps", "1"]
    assert stage2.main([*given, "--validation-steps", "1", "--validation-cfg", "1"]) == 0
    Image.new("RGB", (16, 16), (120, 80, 40)).save(small)
    assert cli(["upscale", str(small), str(large), "--control", str(folder), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text("utf-8"))["settings"]["steps"] == 1
    assert cli(["upscale", str(small), str(tmp_path / "x.png"), "--model", str(folder)]) == 1


def write_pages(folder: Path, count: int = 6) -> Path:
    """Pages with coloured bars, which the small model has never seen; returns their list, pairs lie beside it."""
    for kind in ("HR", "LR"):
        (folder / "pairs" / kind).mkdir(parents=True)
    lines = []
    for number in range(count):
        draws, page = np.random.default_rng(number), np.full((128, 128, 3), 255, np.uint8)
        for _ in range(40):
            (y, x), (h, w) = draws.integers(0, 120, 2), draws.integers(2, 24, 2)
            page[y : y + h, x : x + w] = draws.integers(0, 2, 3) * 255
        picture = Image.fromarray(page)
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "tags": ["text", "paper"][: 1 + number % 2]}))
        if number < 2:
            hr = picture.crop((0, 0, 64, 64))
            hr.save(folder / "pairs" / "HR" / f"{number}.png")
            hr.resize((16, 16), Image.Resampling.BICUBIC).save(folder / "pairs" / "LR" / f"{number}.png")
    (folder / "pages.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "pages.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_adapt_the_small_model(tmp_path: Path, name: str) -> None:
    pages = write_pages(tmp_path)
    recipe, *more = RECIPES[name]
    files = {
        "base": NANO_FOLDER / "checkpoints" / "seesr-nano.safetensors",
        "dape": NANO_FOLDER / "dape" / "dape-nano.safetensors",
        "init": NANO_FOLDER / "seesr" / "seesr-nano-control.safetensors",
        "data": pages,
        "validate": pages.parent / "pairs",
        "out": tmp_path / "run",
    }
    given = [text for key, path in files.items() for text in (f"--{key}", str(path))]
    few = "--crop 64 --smallest-photo 64 --validation-steps 10 --loop.batch-size 4 --loop.accumulation 2"
    fast = "--loop.learning-rate 1e-3 --loop.warmup 4 --loop.log-every 4 --loop.sample-every 8 --loop.device cpu"
    # The recipe's own optimizer where it is installed.
    instead = [] if importlib.util.find_spec("bitsandbytes") else ["--loop.optimizer", "adamw-fused"]
    command = [sys.executable, "-m", "trainer.stage2", "--recipe", recipe, *more, *given, *few.split(), *fast.split()]
    for steps in ("8", "16"):
        subprocess.run([*command, *instead, "--loop.steps", steps], check=True, timeout=1800)
    lines = (tmp_path / "run" / "validation.jsonl").read_text("utf-8").splitlines()
    first, last = (json.loads(line)["val_loss"] for line in lines)
    # The small model was tuned for one step from little noise: in so few steps the turbo recipe, which trains all of
    # ControlNet and RCA at every noise level, need not gain; that it runs, goes on and stays sane is asked of it.
    assert last < (1.1 if name == "turbo" else 0.99) * first
    assert sorted(logged(tmp_path / "run")) == [4, 8, 12, 16]


def test_of_a_runs_parts_the_newest_and_before_them_a_finished_model(tiny: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny, tmp_path / "run")
    older, newer = run / "seesr.safetensors", run / "control" / "seesr.safetensors"
    newer.parent.mkdir()
    shutil.copyfile(older, newer)
    os.utime(older, (1, 1))
    with pytest.raises(WeightsError, match="more than one control part"):
        find_model(run)
    (newer.parent / "run.json").write_text("{}", "utf-8")
    assert find_model(run).control == newer
    assert find_model(tiny, GivenFiles(control=newer.parent)).control == newer
    os.utime(older, (2**31, 2**31))
    assert find_model(run).control == older
    shutil.copytree(tiny, run / "model")
    assert find_model(run).control == run / "model" / "seesr.safetensors"
    (run / "model" / "seesr.safetensors").unlink()
    with pytest.raises(WeightsError, match="model has no control part"):
        find_model(run)


def test_without_weights_to_start_from_the_recipe_says_so(
    tiny: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert stage2.main(arguments(tiny, photos, tmp_path, "finetune-24gb", init=False)) == 1
    assert "trained 'rca-image-encoder' goes on from weights that exist: name them by --init" in caplog.text
