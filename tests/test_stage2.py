"""Stage 2: draws that belong to images, what is trained, the validation, and the dry run."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError, SettingsError, WeightsError
from seesr_core.formats.base import Base
from seesr_core.formats.control import ControlParts
from seesr_core.method.rca import rca_parameters
from trainer.capacity.dry_run import dry_run, sample, small_dry_run
from trainer.data.mixture import Source
from trainer.data.photos import read_photos
from trainer.evaluate.quality.builds import Builds
from trainer.evaluate.quality.metrics import Outcome
from trainer.stage2.batches import tag_prompts
from trainer.stage2.command import train_control
from trainer.stage2.networks import build_networks
from trainer.stage2.validation import BANDS, Validation, read_pairs

from .stage2_nets import config, small_networks, small_task, write_photos
from .tiny_model import tagger


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two pairs of noise."""
    for kind, side in (("LR", 16), ("HR", 64)):
        (tmp_path / "pairs" / kind).mkdir(parents=True)
        for index in range(2):
            pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "pairs" / kind / f"{index}.png")
    return tmp_path / "pairs"


def test_an_image_gets_the_same_draws_in_whichever_part_of_the_batch_it_is(photos: Path) -> None:
    whole = small_task(photos, config(batch_size=4)).batch(1)
    parts = [small_task(photos, config(batch_size=4, accumulation=2)).batch(number) for number in (2, 3)]
    for name in ("target", "condition", "noise", "timesteps"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    for name in ("latents", "soft_prompt"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-4, atol=1e-5)
    assert [*parts[0].prompts, *parts[1].prompts] == whole.prompts
    assert len(set(whole.timesteps.tolist())) > 1
    assert not torch.equal(whole.noise[0], whole.noise[1])


def test_a_group_that_is_degraded_together_is_not_divided(photos: Path) -> None:
    grouped = replace(config(batch_size=4, accumulation=4), degradation_group=2)
    with pytest.raises(SettingsError, match=r"Each pass has 1 images, which is no multiple of degradation_group \(2\)"):
        small_task(photos, grouped)


def test_only_the_chosen_timesteps_are_trained(photos: Path) -> None:
    task = small_task(photos, replace(config(), timesteps=(249, 999)))
    assert task.batches._timesteps(torch.tensor([0.0, 0.49, 0.5, 0.999])).tolist() == [249, 249, 999, 999]
    assert small_task(photos).batches._timesteps(torch.tensor([0.0, 0.5, 0.9999])).tolist() == [0, 500, 999]


def test_the_validation_is_the_same_every_time_and_writes_its_pictures(
    photos: Path, pairs: Path, tmp_path: Path
) -> None:
    settings = {"steps": 2, "min_size": 64, "cfg": 1.0}
    task = small_task(photos, validation=Validation(read_pairs(pairs), tagger()[1], settings))
    figures, again = task.sample(tmp_path, 3), task.sample(tmp_path, 4)
    assert figures is not None
    assert figures == again
    assert {"val_loss", "psnr_y", "ssim_y", *(f"val_loss_t{first}" for first, _ in BANDS)} == set(figures)
    bands = [figures[f"val_loss_t{first}"] for first, _ in BANDS]
    assert figures["val_loss"] == pytest.approx(sum(bands) / len(bands))
    with Image.open(tmp_path / "validation-000003.png") as grid:
        assert grid.height == 3 * 64
        assert grid.width > 2 * 64  # labels at the left


def test_any_metric_of_the_evaluation_can_be_among_the_figures(
    photos: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brightness:
        """Of the result, and whether there is an original."""

        def measure(self, pictures: list[Tensor], originals: list[Tensor]) -> list[Outcome]:
            return [Outcome(float(pictures[0].float().mean()) + 1000 * len(originals))]

    def builds(*_: Any, **__: Any) -> Builds:
        return Builds(pictures={"lpips": cast(Any, Brightness()), "musiq": cast(Any, Brightness())})

    monkeypatch.setattr("trainer.stage2.validation.find_builds", builds)
    settings = {"steps": 1, "min_size": 64, "cfg": 1.0}
    validation = Validation.of_folder(pairs, tagger()[1], settings, None, ("lpips", "musiq"))
    figures = small_task(photos, validation=validation).sample(tmp_path, 1)
    assert figures is not None
    assert 0 < figures["musiq"] < 256
    assert figures["lpips"] == pytest.approx(figures["musiq"] + 1000)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("fid", "fid needs a whole set"),
        ("nonsense", "Unknown metrics nonsense"),
        ("maniqa", "cannot be computed here: maniqa"),
    ],
)
def test_metrics_that_a_validation_cannot_have_are_refused_at_the_start(
    pairs: Path, metrics: str, message: str
) -> None:
    if metrics == "maniqa" and importlib.util.find_spec("pyiqa"):
        pytest.skip("pyiqa is here")
    with pytest.raises(SettingsError, match=message):
        Validation.of_folder(pairs, tagger()[1], {}, None, (metrics,))
    with pytest.raises(SettingsError, match="name a folder of pairs by --validate"):
        Validation.of_folder(None, tagger()[1], {}, None, (metrics,))


def test_min_snr_weighs_each_image_by_its_own_timestep(photos: Path) -> None:
    plain, weighed = (small_task(photos, replace(config(), min_snr=gamma)) for gamma in (0.0, 0.01))
    batch = plain.batch(0)
    pred = plain.predict(batch, plain.text_states(batch.prompts))
    per_image = (pred - batch.noise).square().mean((1, 2, 3))
    snr = (batch.acp / (1 - batch.acp)).flatten()
    wanted = (per_image * snr.clamp(max=0.01) / snr).mean()
    assert float(weighed.loss(0)[0].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(plain.loss(0)[0].detach()) == pytest.approx(float(per_image.mean().detach()), rel=1e-5)
    assert float(wanted.detach()) < float(per_image.mean().detach())


def test_pairs_that_do_not_fit_are_refused(pairs: Path) -> None:
    Image.new("RGB", (60, 64)).save(pairs / "HR" / "1.png")
    with pytest.raises(DataError, match=r"HR of 1 has \(64, 60\) pixels, expected four times its LR's \(16, 16\)"):
        read_pairs(pairs)
    (pairs / "HR" / "1.png").unlink()
    with pytest.raises(DataError, match=r"LR has 1 without a partner"):
        read_pairs(pairs)


def test_a_run_logs_its_validation_and_keeps_the_best_state(photos: Path, pairs: Path, tmp_path: Path) -> None:
    settings = config(steps=2, batch_size=2, sample_every=1)
    validation = Validation(read_pairs(pairs), tagger()[1], {"steps": 1, "min_size": 64, "cfg": 1.0})
    listed = small_task(photos).photos
    train_control(settings, small_networks(), listed, tmp_path, validation=validation, base="tiny")
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text("utf-8").splitlines()]
    judged = {line["step"]: line["val_loss"] for line in lines}
    assert sorted(judged) == [1, 2]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text("utf-8"))
    assert best["val_loss"] == min(judged.values())


def test_a_dry_run_counts_parameters_memory_images_and_hours(photos: Path) -> None:
    settings = config(steps=100, batch_size=4, accumulation=2, ema=0.9)
    task = small_task(photos, settings)
    found = dry_run(task, settings.loop)
    controlnet = sum(p.numel() for p in task.networks.controlnet.parameters())
    rca = sum(p.numel() for p in rca_parameters(task.networks.unet).values())
    assert found.trained == controlnet + rca
    assert found.memory["gradients"] == found.memory["average"] == 4 * found.trained
    assert found.memory["optimizer"] == 8 * found.trained
    assert found.memory["weights"] == 4 * (found.trained + found.frozen)
    assert found.checkpoint == 16 * found.trained
    assert found.memory["activations"] > 2 * 3 * 64 * 64 * 4
    assert found.flops > 2 * 64 * 64 * 3 * 9
    assert (found.images, found.photos) == (400, 6)
    assert found.hours == pytest.approx(400 / found.images_per_second / 3600)
    text = "\n".join(found.lines())
    assert f"{found.trained:,} trained" in text
    assert "66.7 epochs of 6 photos" in text
    assert all(p.grad is None for p in task.networks.vae.parameters())


def test_passes_of_two_images_tell_what_larger_ones_take(photos: Path) -> None:
    settings = config(batch_size=6)
    asked: list[int] = []

    def build(loop: Any) -> Any:
        asked.append(loop.batch_size)
        return small_task(photos, replace(settings, loop=loop))

    planned = small_dry_run(build, settings.loop)
    measured = dry_run(build(settings.loop), settings.loop)
    assert asked == [1, 2, 6]
    assert planned.images == measured.images
    assert planned.memory["activations"] == pytest.approx(measured.memory["activations"], rel=0.05)
    assert planned.flops == pytest.approx(measured.flops, rel=0.01)
    assert {**planned.memory, "activations": 0} == {**measured.memory, "activations": 0}


def test_a_dry_run_looks_at_some_photos_only(photos: Path) -> None:
    listed = list(small_task(photos).photos)
    assert sample(listed * 100) == (listed * 100)[::6]
    assert sample(listed) == listed


def test_a_dry_run_leaves_the_weights_as_they_are(photos: Path) -> None:
    task: Any = small_task(photos)
    before = [p.detach().clone() for p in task.trained.parameters()]
    dry_run(task, config().loop)
    assert all(torch.equal(p, old) for p, old in zip(task.trained.parameters(), before, strict=True))


def test_a_run_with_another_tagger_or_base_is_refused(photos: Path, tmp_path: Path) -> None:
    settings = config(steps=1, sample_every=0)
    train_control(settings, small_networks(), small_task(photos).photos, tmp_path, base="tiny")
    for part, name in (("dape", "dape"), ("unet", "base")):
        nets = small_networks()
        parameter = next(iter(nets.dape.parameters())) if part == "dape" else nets.unet.conv_in.weight
        parameter.data.add_(0.1)
        with pytest.raises(DataError, match=rf"other settings \({name}: "):
            train_control(settings, nets, small_task(photos).photos, tmp_path, base="tiny")


@pytest.mark.parametrize("changed", ["tags", "lr", "mixture"])
def test_other_tags_other_lr_or_other_weights_than_at_the_start_are_noticed(
    photos: Path, pairs: Path, tmp_path: Path, changed: str
) -> None:
    listed = small_task(photos).photos
    if changed == "lr":
        listed = read_photos(pairs)
    others = {
        "tags": [replace(photo, tags=(*photo.tags, "more")) for photo in listed],
        "lr": [replace(photo, lr=pairs / "LR" / "1.png") for photo in listed],
        "mixture": [replace(photo, source=Source("a", 2.0)) for photo in listed],
    }
    settings = config(steps=1, sample_every=0)
    train_control(settings, small_networks(), listed, tmp_path / "run", base="tiny")
    with pytest.raises(DataError, match=rf"other settings \({changed}: "):
        train_control(settings, small_networks(), others[changed], tmp_path / "run", base="tiny")


def test_photos_without_tags_train_with_the_empty_prompt_after_one_warning(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = small_task(photos).photos
    none = [replace(photo, tags=(), source=Source("plain", 1.0)) for photo in listed]
    settings = config(steps=1, sample_every=0)
    with caplog.at_level("WARNING"):
        train_control(settings, small_networks(), none, tmp_path / "run", base="tiny")
        assert tag_prompts([*listed[:2], *none[2:]])[2:] == [""] * (len(listed) - 2)
    warnings = [record.getMessage() for record in caplog.records if "no tags" in record.getMessage()]
    assert [text.partition(" and are")[0] for text in warnings] == [
        f"{len(listed)} of {len(listed)} photos (from plain) have no tags",
        f"{len(listed) - 2} of {len(listed)} photos (from plain) have no tags",
    ]
    assert set(small_task(photos, settings).batches.tags) != {""}


def test_weights_of_another_family_are_no_start(photos: Path) -> None:
    nets = small_networks()
    start = ControlParts.from_modules(nets.unet, nets.controlnet, base="tiny")
    base = Base(
        unet_config={**start.unet_config, "cross_attention_dim": 1024},
        unet_state={},
        vae=nets.vae,
        text_encoder=nets.text_encoder,
        tokenizer=nets.tokenizer,
        scheduler={},
    )
    with pytest.raises(WeightsError, match=r"\(tiny\) were made for cross_attention_dim 32, .* has 1024"):
        build_networks(base, nets.dape, config(), start)


def test_rca_and_the_image_encoder_alone_can_be_trained(photos: Path) -> None:
    nets = small_networks()
    start = ControlParts.from_modules(nets.unet, nets.controlnet)
    base = Base(
        unet_config=start.unet_config,
        unet_state={},
        vae=nets.vae,
        text_encoder=nets.text_encoder,
        tokenizer=nets.tokenizer,
        scheduler={},
    )
    settings = replace(config(), trained="rca-image-encoder", hint_channels=(8, 8, 8, 8))
    built = build_networks(base, nets.dape, settings, start)
    learning = [name for name, p in built.controlnet.named_parameters() if p.requires_grad]
    assert {"image_attentions" in name or name.startswith("controlnet_cond_embedding.") for name in learning} == {True}
    assert any("image_attentions" in name for name in learning)
    assert any(name.startswith("controlnet_cond_embedding.") for name in learning)
    assert [name for name, p in built.unet.named_parameters() if p.requires_grad] == list(rca_parameters(built.unet))
