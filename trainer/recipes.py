"""Named training configurations: what each reproduces, what to expect of it, and the command that runs it.

A recipe is a function, so that every run gets a configuration of its own; the command line shows its docstring.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from seesr_core.errors import SettingsError

from .degradation import DegradationConfig, SharpenConfig
from .engine.loop_config import LoopConfig

Config = TypeVar("Config")
Trained = Literal["all", "rca-image-encoder", "lora"]


@dataclass(kw_only=True, slots=True)
class Stage1Config:
    """How DAPE is trained from a tagger; the defaults are the published values."""

    loop: LoopConfig
    """Settings of the optimisation."""
    crop: int = 512
    """Side of the HR crops in pixels; they are degraded at this size, then resized to the tagger's input."""
    min_scale: float = 1.0
    """Photos are shrunk by a random factor between this and 1 before cropping; 0 goes down to the size of the crop."""
    smallest_photo: int = 0
    """Photos with a shorter side than this are skipped; smaller ones than the crop are enlarged to it."""
    skip_grey: bool = False
    """Whether photos without colour are skipped."""
    fixed_crops: bool = False
    """Whether a photo is cropped and flipped alike whenever it is drawn, so that a cache knows the crop again."""
    degradation: DegradationConfig = field(default_factory=lambda: DegradationConfig(quantize=True))
    """How the LR photos are made; by default rounded to 8 bits, as the published set was stored."""
    degradation_group: int = 1
    """Crops that are degraded together and share what the degradation decides once a batch; more is faster."""
    antialias: bool = False
    """Whether resizing to the tagger's input low-passes first; the published environment did not."""
    student_input: Literal["upsampled", "small"] = "upsampled"
    """What the student looks at: the degraded crop enlarged to the size of the clean one, as the published set was
    stored, or as small as it is, which is what the tagger gets in use."""
    pool: int = 0
    """Number of batches that are degraded once, kept and drawn again; 0 degrades every batch afresh. On a CPU
    degradation costs several times as much as the training itself."""
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
        smallest = min(self.crop, self.degradation_group, self.rank, self.alpha, self.samples)
        _require(smallest >= 1, "crop, degradation_group, rank, alpha and samples must be at least 1", smallest)
        least = self.degradation.min_side
        _require(self.crop >= least, f"crop must be at least the {least} pixels the degradation needs", self.crop)
        _require(0 <= self.min_scale <= 1, "min_scale must lie in [0, 1]", self.min_scale)
        _require(self.logits_weight >= 0, "logits_weight must not be negative", self.logits_weight)
        _require(self.pool >= 0, "pool must not be negative", self.pool)
        rounded = self.degradation.quantize or not self.pool
        _require(rounded, "a pool keeps 8 bits, so degradation.quantize must be on", self.degradation.quantize)


@dataclass(kw_only=True, slots=True)
class Stage2Config:
    """How stage 2 is trained."""

    loop: LoopConfig
    """Settings of the optimisation."""
    crop: int = 512
    """Side of the HR crops in pixels, a multiple of 64."""
    min_scale: float = 1.0
    """Photos are shrunk by a random factor between this and 1 before cropping."""
    smallest_photo: int = 0
    """Photos with a shorter side than this are skipped; smaller ones than the crop are enlarged to it."""
    skip_grey: bool = False
    """Whether photos without colour are skipped."""
    fixed_crops: bool = False
    """Whether a photo is cropped and flipped alike whenever it is drawn, so that a cache knows the crop again."""
    degradation: DegradationConfig = field(default_factory=lambda: DegradationConfig(quantize=True))
    """How LR is made from HR."""
    null_text: float = 0.5
    """Probability that an image's tags are replaced by the empty prompt."""
    trained: Trained = "all"
    """What learns: `all`, that is ControlNet, its image encoder and RCA; `rca-image-encoder`, only RCA (of both
    networks) and the image encoder; `lora`, low-rank adapters on all linear layers of the ControlNet's transformers
    and the image encoder. The latter two go on from weights that exist."""
    lora_rank: int = 16
    """Rank of the adapters; their product is not scaled. They are merged when the run ends."""
    timesteps: tuple[int, ...] = ()
    """Timesteps to train on; all if none is given. A distilled base model knows only some."""
    validation_steps: int = 20
    """Sampling steps of the validation."""
    timestep_power: float = 1.0
    """Timesteps are ⌊1000·u^power⌋ with uniform u: 1 is the paper's uniform choice, more favours late steps, which have
    little noise."""
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)
    """Widths of the trainable image encoder; weights to start from bring their own."""
    degradation_group: int = 1
    """Crops that are degraded together and share what the degradation decides once a batch; more is faster."""
    pool: int = 0
    """Number of batches that are prepared once, kept in memory and drawn again with new noise and timesteps; 0 prepares
    every batch afresh. On a CPU degradation and frozen networks cost as much as the training itself."""
    cache_texts: bool = False
    """Whether text states are kept on disk, too, in the run folder: 0.3 MB a prompt at full size. In memory they are
    always kept, up to 1 GiB."""
    cache_pairs: bool = False
    """Whether latents (the posterior's moments) and soft prompts of given LR/HR pairs are kept, up to 1 GiB in memory
    and all of them in the run folder: 0.4 MB a crop at full size. Needs crops that return: fixed ones, or pairs that
    are not larger than the crop."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        _require(self.crop > 0 and self.crop % 64 == 0, "crop must be a positive multiple of 64 pixels", self.crop)
        _require(0 <= self.null_text <= 1, "null_text must lie in [0, 1]", self.null_text)
        _require(self.validation_steps >= 1, "validation_steps must be at least 1", self.validation_steps)
        within = all(0 <= t < 1000 for t in self.timesteps)
        _require(within, "timesteps must lie from 0 to 999", self.timesteps)
        choices = ", ".join(map(repr, get_args(Trained)))
        _require(self.trained in get_args(Trained), f"trained must be one of {choices}", repr(self.trained))
        _require(self.lora_rank >= 1, "lora_rank must be at least 1", self.lora_rank)
        _require(self.timestep_power > 0, "timestep_power must be positive", self.timestep_power)
        _require(self.degradation_group >= 1, "degradation_group must be at least 1", self.degradation_group)
        _require(self.pool >= 0, "pool must not be negative", self.pool)


def _require(condition: bool, expected: str, found: object) -> None:
    if not condition:
        raise SettingsError(f"{expected}, found {found}. Correct it in the recipe or on the command line.")


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
        learning_rate=1.5e-2,
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

    Reproduces: nothing. Any tagger will do as the teacher, the smaller the faster.
    Expected: `dape.safetensors`, `dape-lora.safetensors`, four lines in `log.jsonl` and two sample pictures.
    Hardware: any CPU; seconds.
    Command: python -m trainer.stage1 --recipe debug --teacher tagger.safetensors --data photos --out runs/debug
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


def stage2_paper() -> Stage2Config:
    """The published SeeSR: 150 k steps of batch 192 on 512² crops, AdamW at 5e-5 (paper §4.1).

    Reproduces: `seesr/controlnet` and the RCA of `seesr/unet`, given SD-2-base, the DAPE of stage 1, and LSDIR with the
    first 10 k faces of FFHQ, tagged by the plain tagger. The paper names Adam; the published code runs AdamW with
    weight decay 0.01, and that is what this does.
    Expected: the paper's Table 2.
    Hardware: 8 GPUs of 32 GB in the paper; `--loop.accumulation` cuts the batch into passes that fit, and any number
    of processes (`accelerate launch -m trainer.stage2 …`) gives the same losses.
    Command: python -m trainer.stage2 --recipe paper --data LSDIR.jsonl --base sd-2-base --dape dape.safetensors
        --out runs/seesr
    """
    loop = LoopConfig(steps=150_000, batch_size=192, learning_rate=5e-5, save_every=1000, workers=8)
    return Stage2Config(loop=loop, smallest_photo=512, skip_grey=True, gradient_checkpointing=True)


def stage2_finetune_24gb() -> Stage2Config:
    """Fine-tuning of published weights on one GPU of 24 GB: RCA and the image encoder learn, or adapters (LoRA).

    Reproduces: nothing published; adapts `--init seesr.safetensors` to photos of one's own, such as scans.
    Expected: a validation loss below that of the start; with the embedded small model, 40 steps of 4 drawn pages took
    it from 0.260 at step 10 to 0.240 with `--trained lora`. At full size not measured.
    Hardware: one GPU of 24 GB; run on a CPU with small networks, not on a GPU yet. Planned peak with 2 images a pass,
    whose activations are recomputed, for `rca-image-encoder` (386.7 M parameters) and for `lora` (7.3 M at rank 16):
    weights 8.4 and 8.4 GiB, gradients 1.4 and 0.03, moments in 8 bits 0.7 and 0.01, activations 2.9 and 3.0;
    in all 13.5 and 11.4.
    Command: python -m trainer.stage2 --recipe finetune-24gb --data photos.jsonl --base sd-2-base
        --dape dape.safetensors --init seesr.safetensors --out runs/finetune
    Adapters: the same with `--trained lora --loop.learning-rate 1e-4`; they are merged into the result.
    Given: pairs of LR and HR (`--data` a folder with both) are encoded once with `--cache-pairs --fixed-crops`.
    """
    loop = LoopConfig(
        steps=5000,
        batch_size=32,
        accumulation=16,
        learning_rate=2e-5,
        warmup=100,
        optimizer="adamw-8bit",
        precision="bf16",
        tf32=True,
        save_every=500,
        sample_every=500,
        workers=4,
    )
    return Stage2Config(
        loop=loop, smallest_photo=512, trained="rca-image-encoder", cache_texts=True, gradient_checkpointing=True
    )


def stage2_turbo() -> Stage2Config:
    """SeeSR around SD-turbo: published weights go on at the four timesteps that the distilled U-Net was made for.

    Reproduces: nothing published, whose turbo puts RCA trained with SD-2-base into SD-turbo as it is.
    Expected: the validation loss at t = 250 … 999 below that of the untrained combination; not measured.
    Hardware: one GPU of 80 GB, or several; not timed.
    Command: python -m trainer.stage2 --recipe turbo --data photos.jsonl --base sd-turbo --dape dape.safetensors
        --init seesr.safetensors --out runs/turbo
    """
    loop = LoopConfig(
        steps=20_000,
        batch_size=64,
        accumulation=8,
        learning_rate=2e-5,
        warmup=200,
        precision="bf16",
        save_every=1000,
        workers=8,
    )
    return Stage2Config(loop=loop, smallest_photo=512, timesteps=(249, 499, 749, 999), gradient_checkpointing=True)


def stage2_nano() -> Stage2Config:
    """The ControlNet and RCA of the embedded small model, around its frozen prior, on two CPU cores.

    Reproduces: `seesr_core/nano/seesr/seesr-nano-control.safetensors`, started from the ControlNet that the prior
    learnt with (`--init`).
    Expected: the figures in the model card.
    Hardware: two CPU cores with bf16.
    Command: python -m trainer.nano --photos photos/train.jsonl --out runs/nano (the part `control`)
    """
    loop = LoopConfig(
        steps=400,
        batch_size=32,
        learning_rate=2e-4,
        warmup=10,
        decay="cosine",
        ema=0.995,
        precision="bf16",
        save_every=100,
        sample_every=200,
    )
    return Stage2Config(
        loop=loop,
        crop=128,
        min_scale=0.85,
        degradation=DegradationConfig(sharpen=SharpenConfig(fast=True), quantize=True),
        degradation_group=4,
        timestep_power=1.3,
        hint_channels=(16, 32, 64, 128),
        pool=320,
    )


def stage2_debug() -> Stage2Config:
    """Four steps of batch 2 on 64² crops: every part of the stage in seconds on a CPU, for tests and first attempts.

    Reproduces: nothing. Any base model and DAPE that fit each other will do, the smaller the faster.
    Expected: `seesr-control.safetensors`, four lines in `log.jsonl` and two sample pictures.
    Hardware: any CPU; seconds.
    Command: python -m trainer.stage2 --recipe debug --data photos.jsonl --base base.safetensors
        --dape dape.safetensors --out runs/debug
    """
    loop = LoopConfig(
        steps=4, batch_size=2, learning_rate=1e-3, device="cpu", log_every=1, save_every=2, sample_every=2
    )
    degradation = DegradationConfig(sharpen=SharpenConfig(radius=7, fast=True), quantize=True)
    return Stage2Config(
        loop=loop, crop=64, min_scale=0.5, degradation=degradation, degradation_group=2, hint_channels=(4, 8, 8, 8)
    )


STAGE2_RECIPES: Mapping[str, Callable[[], Stage2Config]] = {
    "paper": stage2_paper,
    "finetune-24gb": stage2_finetune_24gb,
    "turbo": stage2_turbo,
    "nano": stage2_nano,
    "debug": stage2_debug,
}


def get_recipe(table: Mapping[str, Callable[[], Config]], name: str) -> Config:
    """A fresh configuration of the recipe `name`.

    Raises:
        SettingsError: there is no such recipe; the message has the nearest name.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else "Choose one of them."
        raise SettingsError(f"There is no recipe {name!r}; there are {', '.join(table)}. {hint}")
    return table[name]()
