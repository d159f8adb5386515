"""Students of few steps: every term by itself, who learns from what, and the model that comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seesr_core.errors import DataError, SettingsError
from seesr_core.formats.base import load_base
from seesr_core.formats.control import ControlParts, read_control, write_control
from seesr_core.formats.ram import write_dape
from seesr_core.model_files import NANO, find_model
from seesr_core.models import load_models
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.settings import UpscaleSettings
from trainer.data.crops import Crops
from trainer.data.photos import read_photos
from trainer.distill import losses
from trainer.distill.command import main
from trainer.distill.recipes import DISTILL_RECIPES, DistillConfig
from trainer.distill.task import DistillTask, Taught, frozen_teacher
from trainer.engine.adapters import add_lora, lora_deltas, merge_lora, sharing
from trainer.engine.command import get_recipe
from trainer.engine.frozen import keep_frozen
from trainer.engine.loop import train
from trainer.stage2.batches import tag_prompts

from .checkpoint_files import randomize, tokenizer_files, unet_config
from .stage2_nets import small_networks, write_photos
from .tiny_model import DEFAULTS, SCHEDULER, networks, tagger

SHAPE = (2, 4, 3, 5)
KINDS = (("down", "Encoder"), ("up", "Decoder"))


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=draws(seed))


def test_a_constant_error_has_no_edges() -> None:
    target = torch.rand(1, 3, 8, 8, generator=draws(0))
    flat = losses.picture_loss(target + 0.5, target, edge_weight=7.0)
    assert float(flat) == pytest.approx((0.25 + 1e-4) ** 0.5 - 0.01, abs=1e-5)
    stripe = torch.zeros(1, 1, 2, 4)
    stripe[..., 1] = 1.0
    one = (1 + 1e-4) ** 0.5 - 0.01
    # One pixel of four differs, two of three neighbours across, and none down.
    found = losses.picture_loss(stripe, torch.zeros_like(stripe), edge_weight=1.0)
    assert float(found) == pytest.approx(one / 4 + one * 2 / 3 / 2)


def test_the_end_point_draws_the_student_only() -> None:
    student, end = latents(0).requires_grad_(), latents(1).requires_grad_()
    losses.end_point_loss(student, end).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, 2 * (student - end).detach() / student.numel())
    assert end.grad is None


def test_deep_features_of_the_target_are_not_learnt() -> None:
    result, target = ([latents(seed).requires_grad_()] for seed in (0, 1))
    losses.deep_loss(result, target).backward()
    assert result[0].grad is not None
    assert target[0].grad is None


def test_distribution_matching_is_the_difference_of_two_scores() -> None:
    z, noise = latents(0).requires_grad_(), latents(1)
    acp = torch.tensor([0.3, 0.7]).view(-1, 1, 1, 1)
    noisy = (acp.sqrt() * z + (1 - acp).sqrt() * noise).detach()
    real, fake = (noise + 0.1 * latents(seed) for seed in (2, 3))
    losses.distribution_matching_loss(z, noisy, real, fake, acp).backward()
    clean_real, clean_fake = ((noisy - (1 - acp).sqrt() * eps) / acp.sqrt() for eps in (real, fake))
    scale = (z.detach() - clean_real).abs().mean((1, 2, 3), keepdim=True)
    assert z.grad is not None
    assert torch.allclose(z.grad, (clean_fake - clean_real) / scale / z.numel(), rtol=1e-4, atol=1e-7)
    again = latents(0).requires_grad_()
    losses.distribution_matching_loss(again, noisy, real, real, acp).backward()
    assert again.grad is not None
    assert not again.grad.any()


def test_distribution_matching_moves_results_to_the_teacher_s() -> None:
    """Both scores are exact here, of Gaussians around 2 (real) and around the present mean of the results (fake)."""
    z = torch.zeros(256, 1, 1, 1).requires_grad_()
    acp, rate, generator = torch.full((256, 1, 1, 1), 0.5), 0.1 * 256, draws(0)
    for _ in range(200):
        noisy = acp.sqrt() * z.detach() + (1 - acp).sqrt() * torch.randn(z.shape, generator=generator)
        real, fake = ((noisy - acp.sqrt() * mean) * (1 - acp).sqrt() for mean in (2.0, float(z.detach().mean())))
        (gradient,) = torch.autograd.grad(losses.distribution_matching_loss(z, noisy, real, fake, acp), z)
        z = (z - rate * gradient).detach().requires_grad_()
    assert float(z.detach().mean()) == pytest.approx(2.0, abs=0.2)


def task(folder: Path, defaults: dict[str, Any] | None = None, **changes: Any) -> DistillTask:
    recipe = get_recipe(DISTILL_RECIPES, "debug")
    config = replace(recipe, **{"hint_channels": (4, 8, 8, 8), **changes})
    crops = Crops(read_photos(write_photos(folder)), size=64, min_scale=0.5)
    teacher = frozen_teacher(small_networks())
    keep_frozen(teacher.unet, config.frozen_dtype)
    own = {"solver": "ddpm", "cfg": 3.0} if defaults is None else defaults
    return DistillTask(config, teacher, crops, tag_prompts(crops.photos), teacher_defaults=own)


def test_a_student_begins_as_its_teacher(tmp_path: Path) -> None:
    made = task(tmp_path, {"cfg": 1.0, "spacing": "trailing"}, teacher_steps=4)
    assert made.teacher_settings.denoised_timesteps() == made.settings.denoised_timesteps() == [249]
    shown = made.shown.get(0, made._show)
    assert isinstance(shown, Taught)
    assert torch.equal(made.restored(shown, 0), shown.end_point)
    assert float(made.terms(shown, made.restored(shown, 0), 0)["end_point"].detach()) == 0


def test_the_teacher_is_guided_and_runs_all_its_steps(tmp_path: Path) -> None:
    made = task(tmp_path)
    assert made.teacher_settings.denoised_timesteps() == [249, 187, 125, 63, 1]
    assert made.teacher_settings.cfg == 3.0
    shown = made.shown.get(0, made._show)
    assert isinstance(shown, Taught)
    plain = task(tmp_path, {"cfg": 1.0})
    other = plain.shown.get(0, plain._show)
    assert isinstance(other, Taught)
    assert torch.equal(shown.noise, other.noise)
    assert not torch.equal(shown.end_point, other.end_point)


def test_each_term_teaches_its_own_network(tmp_path: Path) -> None:
    made = task(tmp_path)
    shown = made.shown.get(0, made._show)
    names = {name: p for name, p in made.trained.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    reached = {}
    for term in ("picture", "latent", "end_point", "matching", "follower"):
        made.trained.zero_grad()
        made.terms(shown, made.restored(shown, 0), 0)[term].backward()
        touched = (name for name, p in names.items() if p.grad is not None and bool(p.grad.any()))
        reached[term] = {name.partition(".")[0] for name in touched}
    student, follower = {"controlnet", "unet"}, {"follower_controlnet", "follower_unet"}
    # At the start both see the same, so that there is nothing to match.
    assert reached.pop("matching") <= student
    assert reached == {**dict.fromkeys(("picture", "latent", "end_point"), student), "follower": follower}
    assert not any(p.requires_grad for p in made.taught_by.unet.parameters())


def test_teacher_student_and_follower_hold_their_weights_once(tmp_path: Path) -> None:
    made = task(tmp_path, frozen_dtype="bf16")
    assert made.follower is not None
    unets = (made.taught_by.unet, made.networks.unet, made.follower.unet)
    layers = [getattr(unet.conv_in, "base_layer", unet.conv_in) for unet in unets]
    assert len({layer.weight.data_ptr() for layer in layers}) == 1
    assert layers[0].weight.dtype == torch.bfloat16
    assert {p.dtype for p in made.trained.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.slow
def test_a_run_goes_on_exactly(tmp_path: Path) -> None:
    config = task(tmp_path).config
    whole = train(task(tmp_path), config.loop, tmp_path / "whole", identity=task(tmp_path).identity())
    half = replace(config.loop, steps=2)
    train(task(tmp_path, loop=half), half, tmp_path / "parts", identity=task(tmp_path).identity())
    parts = train(task(tmp_path), config.loop, tmp_path / "parts", identity=task(tmp_path).identity())
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    other = task(tmp_path, {"cfg": 2.0})
    with pytest.raises(DataError, match=r"teacher's guidance: 3\.0 -> 2\.0"):
        train(other, config.loop, tmp_path / "parts", identity=other.identity())


def test_adapters_add_what_merging_adds() -> None:
    network = small_networks().unet.requires_grad_(False)
    other = sharing(network)
    add_lora(other, 2, everywhere=True)
    for index, parameter in enumerate(p for p in other.parameters() if p.requires_grad):
        parameter.data.normal_(generator=draws(index)).mul_(0.05)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    wanted = {name: before[name] + delta for name, delta in lora_deltas(other).items()}
    assert "conv_in.weight" in wanted
    assert any("image_attentions" in name for name in wanted)
    merge_lora(other)  # which writes into the weights that both share
    after = network.state_dict()
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_steps": 5}, "student_steps must lie from 1 to 4, found 5"),
        ({"start": 300}, "start must be one below a divisor of 1000, as 999 and 249, found 300"),
        ({"learns": "decoder"}, "learns must be 'denoiser'"),
        ({"matching_timesteps": (900, 20)}, "must rise within"),
        ({"matching_weight": 1.0, "noise_share": 0.1}, "noise_share must be 0"),
    ],
)
def test_what_cannot_be_distilled_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(get_recipe(DISTILL_RECIPES, "debug"), **changes)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [999, 499, 249])
def test_a_student_runs_as_many_steps_as_it_was_made_for(steps: int, start: int) -> None:
    config: DistillConfig = replace(get_recipe(DISTILL_RECIPES, "debug"), student_steps=steps, start=start)
    run = UpscaleSettings.for_model(config.student()).denoised_timesteps()
    assert (len(run), run[0]) == (steps, start)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug recipe on the embedded model, by its command."""
    folder = tmp_path_factory.mktemp("distill")
    arguments = ["--recipe", "debug", "--data", str(write_photos(folder)), "--out", str(folder / "student")]
    assert main([*arguments, "--loop.steps", "2", "--loop.sample-every", "0"]) == 0
    return folder / "student"


def test_the_debug_recipe_makes_a_whole_model(finished: Path) -> None:
    files, teacher = find_model(finished), find_model(NANO)
    assert files.control.parent.parent == files.base.parent.parent == finished / "model"
    student, before = (read_control(path) for path in (files.control, teacher.control))
    wanted = {"solver": "ddim", "steps": 4, "spacing": "trailing", "start_timestep": 249, "cfg": 1.0}
    assert {name: student.defaults[name] for name in wanted} == wanted
    assert student.defaults["color_fix"] == before.defaults["color_fix"]
    assert student.controlnet_state.keys() == before.controlnet_state.keys()
    moved = [k for k, v in before.controlnet_state.items() if not torch.equal(v, student.controlnet_state[k])]
    assert len(moved) > 50


def test_the_student_upscales_by_its_own_settings(finished: Path) -> None:
    models = load_models(finished, device="cpu", dtype="fp32")
    photo = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=draws(0)).numpy()
    settings = UpscaleSettings.for_model(models.defaults, min_size=64)
    result = SeeSRPipeline(models=models)(photo, settings)
    assert result.image.size == (96, 64)
    assert settings.denoised_timesteps() == [249]


@pytest.fixture(scope="module")
def published_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher around an autoencoder of SD-2's kind, its base a diffusers folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("published") / "teacher"
    parts = networks()
    write_control(
        folder / "seesr.safetensors",
        ControlParts.from_modules(parts["unet"], parts["controlnet"], base="tiny", defaults=DEFAULTS),
        dtype=torch.float32,
    )
    write_dape(folder / "dape.safetensors", *tagger(), dtype=torch.float32)
    levels: dict[str, Any] = {f"{side}_block_types": (f"{side.title()}{kind}Block2D",) * 4 for side, kind in KINDS}
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=4, **levels)
    made = {"unet": UNet2DConditionModel.from_config(unet_config([False, True], widths=[32, 64]))}
    made |= {"vae": randomize(vae, 3), "text_encoder": parts["text_encoder"]}
    made["unet"].load_state_dict(parts["unet"].state_dict(), strict=False)
    for name, network in made.items():
        network.save_pretrained(folder / "base" / name)
    (folder / "base" / "tokenizer").mkdir()
    tokenizer_files().write(folder / "base" / "tokenizer")
    (folder / "base" / "scheduler").mkdir()
    (folder / "base" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER), "utf-8")
    return folder


def test_a_student_with_sd_2_s_autoencoder_is_a_diffusers_folder(published_teacher: Path) -> None:
    out, photos = published_teacher.parent / "student", write_photos(published_teacher.parent)
    arguments = ["--recipe", "debug", "--data", str(photos), "--teacher-model", str(published_teacher)]
    assert main([*arguments, "--out", str(out), "--loop.steps", "2", "--loop.sample-every", "0"]) == 0
    files = find_model(out)
    assert files.base == out / "model" / "base"
    teacher, student = (load_base(folder / "base") for folder in (published_teacher, out / "model"))
    assert type(student.vae).__name__ == "AutoencoderKL"
    assert student.vae.config.scaling_factor == teacher.vae.config.scaling_factor
    assert student.scheduler == teacher.scheduler
    assert student.unet_state.keys() == teacher.unet_state.keys()
    halves = {name: tensor.half() for name, tensor in teacher.vae.state_dict().items()}
    assert all(torch.equal(tensor.half(), halves[name]) for name, tensor in student.vae.state_dict().items())
    moved = [
        key for key, tensor in teacher.unet_state.items() if not torch.equal(tensor.half(), student.unet_state[key])
    ]
    assert len(moved) > 10
    models = load_models(out, device="cpu", dtype="fp32")
    lr = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=draws(0)).numpy()
    assert SeeSRPipeline(models=models)(lr, UpscaleSettings.for_model(models.defaults, min_size=64)).image.size == (
        96,
        64,
    )
