"""The few-step tuning: what it runs, what it learns from, and whose gradient goes where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr_core.errors import WeightsError
from trainer.data.crops import Crops
from trainer.data.photos import read_photos
from trainer.data.teacher import Teacher
from trainer.deep_features import EfficientNetLite0
from trainer.degradation import DegradationConfig, GeneratorDraws, SharpenConfig, degrade
from trainer.distill.critic import Critic
from trainer.distill.few_steps import FewStepConfig, FewStepTask, mild, without_critic
from trainer.distill.losses import hinge_loss, with_tones_of
from trainer.engine.loop import train
from trainer.engine.loop_config import LoopConfig
from trainer.stage2.batches import tag_prompts

from .stage2_nets import small_networks, write_photos

DEFAULTS = {"solver": "ddim", "steps": 10, "spacing": "trailing", "start_timestep": 99, "cfg": 1.0}


def task(folder: Path, *, teacher: Any = None, **changes: Any) -> FewStepTask:
    loop = LoopConfig(steps=2, batch_size=2, learning_rate=1e-3, device="cpu", log_every=1, save_every=1)
    degradation = DegradationConfig(sharpen=SharpenConfig(radius=7, fast=True), quantize=True)
    settings: dict[str, Any] = {"deep_weight": 0.0, "noise_share": 0.0, "hint_channels": (4, 8, 8, 8)}
    settings |= {"loop": loop, "crop": 64, "min_scale": 0.5, "degradation": degradation, **changes}
    config = FewStepConfig(**settings)
    crops = Crops(read_photos(write_photos(folder)), size=64, min_scale=0.5)
    return FewStepTask(config, small_networks(), crops, tag_prompts(crops.photos), defaults=DEFAULTS, teacher=teacher)


def test_the_shipped_steps_are_run(tmp_path: Path) -> None:
    made = task(tmp_path)
    assert made.settings.denoised_timesteps() == [99]
    z = made.restored(made.shown.get(0, made._show), 0)
    assert z.shape == (2, 4, 8, 8)
    assert torch.equal(z, made.restored(made.shown.get(0, made._show), 0))


@pytest.mark.parametrize("learns", ["denoiser", "decoder", "all"])
def test_gradients_reach_what_learns_and_nothing_else(tmp_path: Path, learns: str) -> None:
    made = task(tmp_path, learns=learns)
    loss, _ = made.loss(0)
    loss.backward()
    nets = made.networks
    reached = {
        name: any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
        for name, module in {"unet": nets.unet, "controlnet": nets.controlnet, "decoder": nets.vae.decoder}.items()
    }
    denoiser, decoder = learns != "decoder", learns != "denoiser"
    assert reached == {"unet": denoiser, "controlnet": denoiser, "decoder": decoder}
    assert all(p.grad is None for p in nets.vae.encoder.parameters())


def test_it_trains_and_resumes_in_the_loop(tmp_path: Path) -> None:
    weights = train(task(tmp_path), task(tmp_path).config.loop, tmp_path / "run")
    assert any(name.startswith("unet.") for name in weights)
    assert any(name.startswith("controlnet.") for name in weights)


def test_targets_are_photo_and_teacher_by_their_weights(tmp_path: Path) -> None:
    made = task(tmp_path, teacher=lambda lr: F.interpolate(lr, scale_factor=4), teacher_weight=0.25)
    zero, one = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    both = made._to_both(made.picture_loss, zero, one, zero)
    assert float(both) == pytest.approx(0.75 * float(made.picture_loss(zero, one)))


def test_only_the_teacher_s_detail_is_learnt(tmp_path: Path) -> None:
    def darker(lr: Tensor) -> Tensor:
        drawn = F.interpolate(lr, scale_factor=4) * 0.5
        drawn[..., ::2] += 0.1
        return drawn

    made = task(tmp_path, teacher=darker)
    shown = made._show(0)
    taught, hr = (image.float().div(255) for image in (shown.taught, shown.hr))
    inner = (..., slice(1, -1), slice(1, -1))
    assert float((F.avg_pool2d(taught, 8) - F.avg_pool2d(hr, 8))[inner].abs().mean()) < 0.03
    across = taught[..., 1:] - taught[..., :-1]
    assert float(across[..., 1::2].mean() - across[..., ::2].mean()) == pytest.approx(0.2, abs=0.02)
    plain = task(tmp_path, teacher=darker, teacher_detail=False)._show(0).taught.float().div(255)
    assert float(plain.mean()) < 0.75 * float(hr.mean())
    even = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(with_tones_of(even * 0 + 0.2, even * 0 + 0.7), even * 0 + 0.7)


def test_some_soft_prompts_are_those_of_the_clean_crops(tmp_path: Path) -> None:
    degraded, some, clean = (
        torch.cat([task(tmp_path, clean_prompts=share)._show(n).soft_prompt for n in range(4)])
        for share in (0.0, 0.5, 1.0)
    )
    shown = task(tmp_path)._show(0)
    exact = task(tmp_path).networks.soft_prompt(shown.hr.float().div(255))
    torch.testing.assert_close(clean[:2], exact)
    of_clean, of_degraded = (torch.isclose(some, other).all(2).all(1) for other in (clean, degraded))
    assert (of_clean ^ of_degraded).all()
    assert 1 <= int(of_clean.sum()) < 8


def test_exact_codes_are_judged_by_the_photo_alone(tmp_path: Path) -> None:
    """A decoder that were taught the teacher's picture of an exact code would no longer be the encoder's inverse."""
    losses = [
        task(tmp_path, teacher=teacher, learns="decoder", exact_share=1.0).loss(0)[0]
        for teacher in (lambda lr: F.interpolate(lr, scale_factor=4), lambda lr: F.interpolate(lr * 0, scale_factor=4))
    ]
    assert torch.equal(*losses)


def test_a_window_holds_the_same_place_of_latents_and_pictures(tmp_path: Path) -> None:
    made = task(tmp_path, window=16)
    z = torch.arange(64.0).view(1, 1, 8, 8)
    picture = F.interpolate(z, scale_factor=8)
    seen = [made._window(step, z, picture) for step in range(20)]
    assert all(torch.equal(F.interpolate(part, scale_factor=8), shown) for part, shown in seen)
    assert {tuple(part.shape) for part, _ in seen} == {(1, 1, 2, 2)}
    assert len({float(part[0, 0, 0, 0]) for part, _ in seen}) > 5


def test_mild_degradation_is_mild() -> None:
    x = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    photos = F.interpolate(x, (64, 64), mode="bicubic").clamp(0, 1)
    lr = degrade(photos, mild(), GeneratorDraws(torch.Generator().manual_seed(1))).lr
    shrunk = F.interpolate(photos, (16, 16), mode="area")
    assert lr.shape == shrunk.shape
    assert float((lr - shrunk).square().mean().sqrt()) < 0.05


class Nearest(nn.Module):
    """A teacher that repeats pixels."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale, self.purpose, self.input_channels, self.output_channels = scale, "SR", 3, 3
        self.architecture, self.model = SimpleNamespace(name="nearest"), nn.Module()

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.scale)


def test_a_teacher_s_border_is_cut_again() -> None:
    lr = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    made = Teacher(Nearest(4), scale=4, device=torch.device("cpu"))
    assert torch.equal(made(lr), F.interpolate(lr, scale_factor=4))


def test_a_teacher_of_another_scale_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"enlarge colour pictures 4 times, but nearest is made for SR ×2"):
        Teacher(Nearest(2), scale=4, device=torch.device("cpu"))


def judged(folder: Path, **changes: Any) -> FewStepTask:
    return task(folder, learns="all", critic_weight=0.5, critic_warmup=0, exact_share=0.0, **changes)


def gradients(made: FewStepTask, *terms: str) -> dict[str, Tensor]:
    """What the named terms pull each trained part by: all its gradients in a row."""
    shown = made.shown.get(0, made._show)
    found = made.terms(shown, made.restored(shown, 0), made.config.loop.parts)
    loss = torch.stack([found[name] for name in terms]).sum()
    parameters = {part: [*module.parameters()] for part, module in made.trained.named_children()}
    return {
        part: torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(own, torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True), strict=True)
                if p.requires_grad
            ]
        )
        for part, own in parameters.items()
    }


def test_the_critic_learns_by_its_own_loss_and_the_networks_by_fooling_it(tmp_path: Path) -> None:
    made = judged(tmp_path)
    own, fooling = gradients(made, "critic"), gradients(made, "fooled")
    assert {part for part, pull in own.items() if pull.abs().sum() > 0} == {"critic"}
    assert {part for part, pull in fooling.items() if pull.abs().sum() > 0} == {"unet", "controlnet", "decoder"}


def test_the_critic_pulls_at_the_picture_by_its_share_of_what_else_does(tmp_path: Path) -> None:
    made = judged(tmp_path)
    picture, hr, condition = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(3))
    picture.requires_grad_()
    terms = {"picture": made.picture_loss(picture, hr)}
    assert made.critic is not None
    (others,) = torch.autograd.grad(terms["picture"], picture, retain_graph=True)
    found = made._judged(made.critic, picture, hr, condition, terms, 1)
    (pull,) = torch.autograd.grad(found["fooled"], picture)
    assert float(pull.norm()) == pytest.approx(0.5 * float(others.norm()), rel=1e-4)
    assert found["fooled"].item() == pytest.approx(
        -sum(float(heads.mean()) for heads in made.critic(picture.detach(), condition)), rel=1e-3, abs=1e-3
    )


def test_a_critic_trains_in_half_precision(tmp_path: Path) -> None:
    """The picture that is judged is that which the other losses see, also where the decoder answers in bf16."""
    made = judged(tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = made.loss(0)
    loss.backward()
    for part in ("unet", "controlnet", "decoder", "critic"):
        pulls = [p.grad.abs().sum() for p in made.trained.get_submodule(part).parameters() if p.grad is not None]
        assert sum(pulls) > 0, part


def test_the_critic_learns_alone_at_first(tmp_path: Path) -> None:
    made = judged(tmp_path)
    made.config.critic_warmup = 4
    assert [made._critic_share(step) for step in (0, 4, 5, 6, 8, 99)] == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


def test_a_critic_on_features_and_pixels_judges_what_it_was_taught_to() -> None:
    """Noise beside the smooth picture of it: a few steps of its own loss are enough to tell them apart."""
    torch.manual_seed(0)
    critic, features = Critic(with_features=True), EfficientNetLite0().requires_grad_(False)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.5, 0.95))
    photo = torch.rand(2, 3, 32, 32) * 2 - 1
    smooth = F.avg_pool2d(F.pad(photo, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    seen, sharp = (features.features(image.add(1).div(2)) for image in (smooth, photo))

    def judge() -> tuple[list[Tensor], list[Tensor]]:
        return critic(photo, smooth, sharp, seen), critic(smooth, smooth, seen, seen)

    for _ in range(30):
        optimizer.zero_grad()
        hinge_loss(*judge()).backward()
        optimizer.step()
    photos, results = judge()
    assert len(photos) == 4
    assert all(p.mean() > r.mean() for p, r in zip(photos, results, strict=True))


def test_the_model_keeps_nothing_of_the_critic(tmp_path: Path) -> None:
    made = judged(tmp_path)
    weights = train(made, made.config.loop, tmp_path / "run", identity=made.identity())
    assert any(name.startswith("critic.") for name in weights)
    assert not any(name.startswith("critic.") for name in without_critic(weights))
    assert set(without_critic(weights)) < set(weights)
