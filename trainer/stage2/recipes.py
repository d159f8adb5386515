"""Recipes of stage 2: what each reproduces, what to expect of it, and the command that runs it.

A recipe is a function, so that every run gets a configuration of its own; the command line shows its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from seesr_core.method.color import ColorFix
from seesr_core.method.sampling import Solver
from seesr_core.settings import UpscaleSettings

from ..data.stage_config import StageConfig, require
from ..degradation import DegradationConfig, SharpenConfig
from ..engine.frozen import FrozenDtype
from ..engine.loop_config import LoopConfig

Trained = Literal["all", "rca-image-encoder", "image-encoder", "lora"]


@dataclass(kw_only=True, slots=True)
class Stage2Config(StageConfig):
    """How stage 2 is trained."""

    null_text: float = 0.5
    """Probability that an image's tags are replaced by the empty prompt."""
    trained: Trained = "all"
    """What learns: `all`, that is ControlNet, its image encoder and RCA; `rca-image-encoder`, only RCA (of both
    networks) and the image encoder; `image-encoder`, it alone; `lora`, low-rank adapters on all linear layers of the
    ControlNet's transformers and the image encoder. The latter three go on from weights that exist."""
    lora_rank: int = 16
    """Rank of the adapters; their product is not scaled. They are merged when the run ends."""
    timesteps: tuple[int, ...] = ()
    """Timesteps to train on; all if none is given. A distilled base model knows only some."""
    validation_steps: int | None = None
    """Sampling steps of the validation. This and the next four become the defaults of the exported model; what is not
    given is that of the weights to start from. Where these have none, the validation takes 20 steps and none are
    written."""
    validation_solver: Solver | None = None
    """Sampler of the validation."""
    validation_start: int | None = None
    """Timestep at which the validation begins."""
    validation_cfg: float | None = None
    """Guidance scale of the validation."""
    validation_color_fix: ColorFix | None = None
    """How the validation's results get the photo's colours."""
    timestep_power: float = 1.0
    """Timesteps are ⌊1000·u^power⌋ with uniform u: 1 is the paper's uniform choice, more favours late steps, which have
    little noise."""
    min_snr: float = 0.0
    """γ of min-SNR weighting, which lets timesteps of little noise count less, those whose signal-to-noise ratio is
    above γ; 5 is its authors' choice, 0 leaves equation 2 as it is."""
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)
    """Widths of the trainable image encoder; weights to start from bring their own."""
    cache_texts: bool = False
    """Whether text states are kept on disk, too, in the run folder: 0.3 MB a prompt at full size. In memory they are
    always kept, up to 1 GiB."""
    cache_pairs: bool = False
    """Whether latents (the posterior's moments) and soft prompts of given LR/HR pairs are kept, up to 1 GiB in memory
    and all of them in the run folder: 0.4 MB a crop at full size. Needs crops that return: fixed ones, or pairs that
    are not larger than the crop."""
    frozen_dtype: FrozenDtype = "fp32"
    """How the weights of frozen networks are kept: U-Net without RCA, autoencoder, text encoder and tagger. `bf16` and
    `fp16` take half the memory, `8bit` (bitsandbytes) a quarter; norms and biases stay in fp32. A pass spares as much
    if it is computed in that precision, or with `gradient_checkpointing`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        require(self.crop > 0 and self.crop % 64 == 0, "crop must be a positive multiple of 64 pixels", self.crop)
        require(0 <= self.null_text <= 1, "null_text must lie in [0, 1]", self.null_text)
        within = all(0 <= t < 1000 for t in self.timesteps)
        require(within, "timesteps must lie from 0 to 999", self.timesteps)
        choices = ", ".join(map(repr, get_args(Trained)))
        require(self.trained in get_args(Trained), f"trained must be one of {choices}", repr(self.trained))
        UpscaleSettings.for_model(self.sampling())
        require(self.lora_rank >= 1, "lora_rank must be at least 1", self.lora_rank)
        require(self.min_snr >= 0, "min_snr must not be negative", self.min_snr)
        require(self.timestep_power > 0, "timestep_power must be positive", self.timestep_power)

    def sampling(self) -> dict[str, Any]:
        """The settings of sampling that are given, by the names of `UpscaleSettings`."""
        given = {
            "steps": self.validation_steps,
            "solver": self.validation_solver,
            "start_timestep": self.validation_start,
            "cfg": self.validation_cfg,
            "color_fix": self.validation_color_fix,
        }
        return {name: value for name, value in given.items() if value is not None}


def stage2_paper() -> Stage2Config:
    """The published SeeSR: 150 k steps of batch 192 on 512² crops, AdamW at 5e-5 (paper §4.1).

    Reproduces: `seesr/controlnet` and the RCA of `seesr/unet`, given SD-2-base, the DAPE of stage 1, and LSDIR with the
    first 10 k faces of FFHQ, tagged by the plain tagger. The paper names Adam; the published code runs AdamW with
    weight decay 0.01, and that is what this does. It runs in mixed precision (fp16), and so does this: in bf16 where
    the device computes in it, since that needs no loss scaling; `--loop.precision fp32` for all of it in fp32.
    Expected: the paper's Table 2.
    Hardware: 8 GPUs of 32 GB in the paper; `--loop.accumulation` cuts the batch into passes that fit, and any number
    of processes (`accelerate launch -m trainer.stage2 …`) gives the same losses.
    Command: python -m trainer.stage2 --recipe paper --data LSDIR.jsonl --base sd-2-base --dape dape.safetensors
        --out runs/seesr
    """
    loop = LoopConfig(steps=150_000, batch_size=192, learning_rate=5e-5, precision="mixed", save_every=1000, workers=8)
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
    return Stage2Config(
        loop=loop,
        smallest_photo=512,
        timesteps=(249, 499, 749, 999),
        validation_steps=4,
        validation_cfg=1.0,
        gradient_checkpointing=True,
    )


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
        # Few deterministic steps from little noise: a net this small adds grain at every noisy step.
        validation_steps=4,
        validation_solver="ddim",
        validation_start=251,
        validation_cfg=1.0,
        validation_color_fix="wavelet",
    )


def stage2_debug() -> Stage2Config:
    """Four steps of batch 2 on 64² crops: every part of the stage in seconds on a CPU, for tests and first attempts.

    Reproduces: nothing. The embedded base model and DAPE, or any others that fit each other, the smaller the faster.
    Expected: `seesr-control.safetensors`, four lines in `log.jsonl` and two sample pictures.
    Hardware: any CPU; seconds.
    Command: python -m trainer.stage2 --recipe debug --data photos --out runs/debug
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
