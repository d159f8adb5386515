"""Recipes of stage 1: what each reproduces, what to expect of it, and the command that runs it.

A recipe is a function, so that every run gets a configuration of its own; the command line shows its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..data.stage_config import StageConfig, require
from ..degradation import DegradationConfig, SharpenConfig
from ..engine.loop_config import LoopConfig


@dataclass(kw_only=True, slots=True)
class Stage1Config(StageConfig):
    """How DAPE is trained from a tagger; the defaults are the published values."""

    antialias: bool = False
    """Whether resizing to the tagger's input low-passes first; the published environment did not."""
    student_input: Literal["upsampled", "small"] = "upsampled"
    """What the student looks at: the degraded crop enlarged to the size of the clean one, as the published set was
    stored, or as small as it is, which is what the tagger gets in use."""
    cache_teacher: bool = False
    """Whether the teacher's outputs are kept, up to 1 GiB in memory and all of them in the run folder: 0.6 MB a crop at
    full size. Needs crops that return: from a pool, fixed, or square photos that are not larger than the crop."""
    rank: int = 8
    """Rank of the adapter."""
    alpha: int = 1
    """The adapter's product is scaled by alpha / rank."""
    logits_weight: float = 1.0
    """λ of equation 1."""
    samples: int = 8
    """Photos that are never trained on, but shown in the sample pictures with their tags."""
    export: Literal["fp16", "fp32"] = "fp16"
    """Precision of the merged `dape.safetensors`."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        smallest = min(self.rank, self.alpha, self.samples)
        require(smallest >= 1, "rank, alpha and samples must be at least 1", smallest)
        least = self.degradation.min_side
        require(self.crop >= least, f"crop must be at least the {least} pixels the degradation needs", self.crop)
        require(self.logits_weight >= 0, "logits_weight must not be negative", self.logits_weight)
        rounded = self.degradation.quantize or not self.pool
        require(rounded, "a pool keeps 8 bits, so degradation.quantize must be on", self.degradation.quantize)


def stage1_paper() -> Stage1Config:
    """The published DAPE: 20 k steps of batch 32 on 512² crops, AdamW at 1e-4 without weight decay (paper §4.1).

    Reproduces: `DAPE.pth`, given `ram_swin_large_14m.pth` as the teacher and LSDIR as the data. Warm-up of 50 steps and
    halving at 20 k and 30 k are those of the published configuration.
    Expected: the sample pictures' `loss_dape` well below `loss_plain`; the paper states no figure for this stage alone.
    Hardware: one GPU of 40 GB or more; not timed.
    Command: python -m trainer.stage1 --recipe paper --teacher ram_swin_large_14m.pth --tag-lists ram/data
        --data LSDIR --out runs/dape
    """
    loop = LoopConfig(
        steps=20_000,
        batch_size=32,
        learning_rate=1e-4,
        weight_decay=0.0,
        warmup=50,
        milestones=(20_000, 30_000),
        max_grad_norm=math.inf,
        workers=8,
    )
    return Stage1Config(loop=loop, smallest_photo=512, skip_grey=True)


def stage1_nano() -> Stage1Config:
    """The DAPE of the embedded small model: 800 steps of batch 16 on 256² crops, on two CPU cores.

    Reproduces: `seesr_core/nano/dape/dape-nano.safetensors`, given the small tagger as the teacher.
    The adapter's scale of 1/8 is the published one; a net this small needs a larger learning rate to move by as much.
    Crops are nearly whole photos, and the student looks at them as small as they are, since that is what the tagger
    gets in use. λ makes up for a mean over words nearly all of which are absent: at 1 the tokens alone would count.
    Photos are not sharpened first: sharpening alone moves what this tagger says of a photo.
    Expected: the figures in the model card (mean average precision of DAPE and of the plain tagger on degraded photos).
    Hardware: two CPU cores with bf16; a quarter of an hour.
    Command: python -m trainer.stage1 --recipe nano --teacher runs/nano/tagger.safetensors --data photos/train.jsonl
        --out runs/nano/dape
    """
    loop = LoopConfig(
        steps=800,
        batch_size=16,
        learning_rate=6e-3,
        weight_decay=0.0,
        warmup=20,
        decay="cosine",
        precision="bf16",
        save_every=100,
        sample_every=200,
    )
    return Stage1Config(
        loop=loop,
        crop=256,
        min_scale=0.0,
        degradation=DegradationConfig(sharpen=SharpenConfig(weight=0.0, fast=True), quantize=True),
        degradation_group=4,
        pool=400,
        cache_teacher=True,
        antialias=True,
        student_input="small",
        logits_weight=50.0,
    )


def stage1_debug() -> Stage1Config:
    """Four steps of batch 2 on 32² crops: every part of the stage in seconds on a CPU, for tests and first attempts.

    Reproduces: nothing. The teacher is the embedded tagger, or any other, the smaller the faster.
    Expected: `dape.safetensors`, `dape-lora.safetensors`, four lines in `log.jsonl` and two sample pictures.
    Hardware: any CPU; seconds.
    Command: python -m trainer.stage1 --recipe debug --data photos --out runs/debug
    """
    loop = LoopConfig(
        steps=4,
        batch_size=2,
        learning_rate=1e-3,
        weight_decay=0.0,
        warmup=2,
        device="cpu",
        log_every=1,
        save_every=2,
        sample_every=2,
    )
    degradation = DegradationConfig(sharpen=SharpenConfig(radius=7, fast=True))
    return Stage1Config(loop=loop, crop=32, min_scale=0.0, degradation=degradation, degradation_group=2, samples=1)


STAGE1_RECIPES: Mapping[str, Callable[[], Stage1Config]] = {
    "paper": stage1_paper,
    "nano": stage1_nano,
    "debug": stage1_debug,
}
