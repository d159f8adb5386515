"""Recipes of students: what each makes of a teacher, what to expect of it, and the command that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from seesr_core.method.schedule import LAST_TIMESTEP, TRAIN_TIMESTEPS

from ..data.stage_config import require
from ..degradation import DegradationConfig, SharpenConfig
from ..engine.loop_config import LoopConfig
from .few_steps import FewStepConfig

MOST_STEPS = 4


@dataclass(kw_only=True, slots=True)
class DistillConfig(FewStepConfig):
    """How a student of few steps is made of a teacher of many."""

    student_steps: int = 1
    """Steps that the student runs, 1 to 4, at guidance 1."""
    start: int = LAST_TIMESTEP
    """Timestep that the LR latent is noised to, for student and teacher, and at which the first step is."""
    teacher_steps: int | None = None
    """Steps of the teacher's full schedule, of which those up to `start` are run, without noise (DDIM); its own
    default if None."""
    teacher_cfg: float | None = None
    """Guidance scale of the teacher; its own default if None."""
    adapt_convolutions: bool = True
    """Whether convolutions get adapters, too, and not only the linear layers of the transformers."""
    end_point_weight: float = 1.0
    """Weight of the error from where the teacher's deterministic sampling ends (SinSR)."""
    matching_weight: float = 0.0
    """Weight of the distribution-matching term (DMD2, OSEDiff), which needs a second pair of adapters that follows the
    student's results; 0 leaves both out."""
    matching_timesteps: tuple[int, int] = (20, 980)
    """The lowest and the highest timestep at which it compares."""

    def __post_init__(self) -> None:
        FewStepConfig.__post_init__(self)
        few = 1 <= self.student_steps <= MOST_STEPS
        require(few, f"student_steps must lie from 1 to {MOST_STEPS}", self.student_steps)
        denoiser = self.learns == "denoiser"
        require(denoiser, "learns must be 'denoiser', since a student shares its teacher's decoder", self.learns)
        whole = 0 <= self.start <= LAST_TIMESTEP and (self.student_steps * TRAIN_TIMESTEPS) % (self.start + 1) == 0
        divided = f"start must be one below a divisor of {self.student_steps * TRAIN_TIMESTEPS}, as 999 and 249"
        require(whole, divided, self.start)
        alone = not (self.matching_weight and self.noise_share)
        require(alone, "noise_share must be 0 with matching_weight, which learns at every step", self.noise_share)
        low, high = self.matching_timesteps
        require(0 <= low < high <= LAST_TIMESTEP, "matching_timesteps must rise within 0 … 999", (low, high))

    def student(self) -> dict[str, Any]:
        """The student's settings of sampling, by the names of `UpscaleSettings`."""
        return {
            "solver": "ddim",
            "steps": self.student_steps * TRAIN_TIMESTEPS // (self.start + 1),
            "spacing": "trailing",
            "start_timestep": self.start,
            "cfg": 1.0,
        }

    def teacher(self) -> dict[str, Any]:
        """The teacher's settings that differ from its own defaults."""
        given = {"solver": "ddim", "start_timestep": self.start, "steps": self.teacher_steps, "cfg": self.teacher_cfg}
        return {name: value for name, value in given.items() if value is not None}


def _config(loop: LoopConfig, **changes: Any) -> DistillConfig:
    """What the recipes for full-size networks share."""
    settings: dict[str, Any] = {"noise_share": 0.0, "lora_rank": 32, "smallest_photo": 512, "skip_grey": True}
    return DistillConfig(loop=loop, gradient_checkpointing=True, **{**settings, **changes})


def one_step() -> DistillConfig:
    """A student of one step from the LR latent noised to t = 999: adapters on U-Net and ControlNet, one network call.

    Reproduces: nothing published as it stands. The losses are those of OSEDiff (pixels, deep features, distribution
    matching) and SinSR (the teacher's deterministic end points), around SeeSR's own networks.
    Expected: not measured at full size; on the embedded small model see docs/training.md.
    Hardware: planned for one GPU of 24 GB (docs/training.md); run on a CPU with small networks, not on a GPU yet.
    Command: python -m trainer.distill --recipe one-step --teacher-model seesr-folder --data photos.jsonl
        --out runs/one-step
    """
    loop = LoopConfig(
        steps=10_000,
        batch_size=16,
        accumulation=16,
        learning_rate=5e-5,
        warmup=100,
        precision="mixed",
        save_every=500,
        sample_every=500,
        workers=4,
    )
    return _config(loop, matching_weight=1.0, frozen_dtype="bf16")


def few_step() -> DistillConfig:
    """A student of four steps, t = 999, 749, 499 and 249, whose gradients go through all of them.

    Reproduces: nothing published as it stands; as `one-step`.
    Expected: not measured at full size; on the embedded small model see docs/training.md.
    Hardware: planned for one GPU of 24 GB (docs/training.md); run on a CPU with small networks, not on a GPU yet.
    Command: python -m trainer.distill --recipe few-step --teacher-model seesr-folder --data photos.jsonl
        --out runs/few-step
    """
    recipe = one_step()
    recipe.student_steps = MOST_STEPS
    return recipe


def debug() -> DistillConfig:
    """Four steps of two 64² crops: a student of the embedded small model in seconds on a CPU, with every term.

    Reproduces: nothing.
    Expected: `model/`, which the nodes and `seesr upscale --model` load, and four lines in `log.jsonl`.
    Hardware: any CPU; seconds.
    Command: python -m trainer.distill --recipe debug --data photos --out runs/debug
    """
    loop = LoopConfig(
        steps=4, batch_size=2, learning_rate=1e-3, device="cpu", log_every=1, save_every=2, sample_every=2
    )
    degradation = DegradationConfig(sharpen=SharpenConfig(weight=0.0, radius=7, fast=True), quantize=True)
    return DistillConfig(
        loop=loop,
        crop=64,
        min_scale=0.5,
        degradation=degradation,
        degradation_group=1,
        noise_share=0.0,
        start=249,
        student_steps=1,
        teacher_steps=16,
        lora_rank=4,
        deep_weight=0.0,
        matching_weight=1.0,
    )


DISTILL_RECIPES: Mapping[str, Callable[[], DistillConfig]] = {
    "one-step": one_step,
    "few-step": few_step,
    "debug": debug,
}
