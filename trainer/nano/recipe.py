"""Recipes of the small model: every part's settings in one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..degradation import DegradationConfig, SharpenConfig
from ..distill.few_steps import FewStepConfig, Learns
from ..engine.loop_config import LoopConfig
from ..stage1.recipes import Stage1Config, stage1_nano
from ..stage2.recipes import Stage2Config, stage2_nano
from .autoencoder import AutoencoderConfig
from .prior import PriorConfig, PriorSizes
from .tagger import TaggerConfig


@dataclass(kw_only=True, slots=True)
class NanoConfig:
    """Settings of all parts, in the order in which they are built."""

    autoencoder: AutoencoderConfig
    """Autoencoder in TAESD's layout."""
    tagger: TaggerConfig
    """RAM's head on EfficientNet-Lite0, on that network's classes and the photos' words."""
    dape: Stage1Config
    """Stage 1 from that tagger."""
    prior: PriorConfig
    """U-Net and text encoder, with a first ControlNet."""
    control: Stage2Config
    """Stage 2 around the frozen prior."""
    few_steps: FewStepConfig
    """U-Net, ControlNet and RCA, tuned end to end for the steps of `defaults`."""
    decoder: FewStepConfig
    """The autoencoder's decoder, tuned on what they restore, and they with it."""
    texture: FewStepConfig
    """All of them, tuned against a critic."""
    texture_share: float = 0.2
    """How far the decoder goes from what it was before to what came of that, 0 to 1. The farther, the
    more a fine weave shows where the photo has no detail."""
    vocab_size: int = 2048
    """Tokens of the text encoder's vocabulary."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Sampling defaults that travel in the control file."""


NANO_DEFAULTS = {
    "solver": "ddim",
    "steps": 10,
    "spacing": "trailing",
    "start_timestep": 99,
    "cfg": 1.0,
    "color_fix": "wavelet",
}
"""One step, t = 99, from a little noise: a net this small adds grain and loses the photo with every step."""


def nano() -> NanoConfig:
    """The embedded small model, on two CPU cores with bf16.

    Reproduces: the files in `seesr_core/nano`, whose card has the steps, hours and figures.
    Expected: visibly sharper than bicubic on real photos; figures in the card.
    Hardware: two CPU cores with AMX, 8 GB; about five hours when nothing else runs.
    Command: python -m trainer.nano --photos photos/train.jsonl --out runs/nano
    """
    fast: dict[str, Any] = {"warmup": 50, "decay": "cosine", "precision": "bf16"}
    joint = LoopConfig(
        steps=1950, batch_size=32, learning_rate=4e-4, ema=0.998, save_every=100, sample_every=500, **fast
    )
    control = stage2_nano()
    decoder = replace(
        _few_steps(learns="all", steps=4000, learning_rate=4e-4, ema=0.995),
        window=96,
        exact_share=0.3,
        deep_weight=1.0,
        teacher_weight=0.25,
    )
    return NanoConfig(
        autoencoder=AutoencoderConfig(
            loop=LoopConfig(
                steps=12000,
                batch_size=8,
                learning_rate=1e-3,
                weight_decay=0.0,
                max_grad_norm=0.5,
                ema=0.995,
                log_every=50,
                save_every=200,
                sample_every=500,
                warmup=50,
                decay="cosine",
            )
        ),
        tagger=TaggerConfig(
            loop=LoopConfig(
                steps=1200,
                batch_size=32,
                learning_rate=7e-4,
                weight_decay=0.05,
                ema=0.997,
                log_every=20,
                save_every=50,
                sample_every=0,
                **fast,
            )
        ),
        dape=stage1_nano(),
        prior=PriorConfig(stage2=replace(control, loop=joint, null_text=0.3)),
        control=control,
        few_steps=_few_steps(steps=2500, learning_rate=6e-4, ema=0.99),
        decoder=decoder,
        texture=replace(
            decoder,
            loop=replace(decoder.loop, steps=2500, learning_rate=1e-4),
            deep_weight=2.0,
            teacher_weight=0.5,
            clean_prompts=0.25,
            noise_share=0.3,
            critic_weight=0.3,
        ),
        defaults=dict(NANO_DEFAULTS),
    )


def _few_steps(*, learns: Learns = "denoiser", **loop: Any) -> FewStepConfig:
    """Eight crops a step, half of them mildly degraded, from 300 prepared batches."""
    often: dict[str, Any] = {"warmup": 20, "decay": "cosine", "save_every": 50, "sample_every": 200}
    return FewStepConfig(
        loop=LoopConfig(batch_size=8, weight_decay=1e-3, **often, **loop),
        learns=learns,
        crop=128,
        min_scale=0.5,
        degradation=DegradationConfig(sharpen=SharpenConfig(weight=0.0, radius=3, fast=True), quantize=True),
        hint_channels=(16, 32, 64, 128),
        pool=300,
    )


def debug() -> NanoConfig:
    """Two or three steps of every part with the smallest nets: the whole path in a minute or two on a CPU.

    Reproduces: nothing; the result draws noise.
    Expected: the three files, and that they load.
    Hardware: any CPU.
    Command: python -m trainer.nano --recipe debug --photos photos --out runs/debug
    """
    loop: dict[str, Any] = {
        "steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "device": "cpu",
        "log_every": 1,
        "save_every": 1,
    }
    degradation = DegradationConfig(sharpen=SharpenConfig(radius=7, fast=True), quantize=True)
    stage2 = Stage2Config(
        loop=LoopConfig(**loop),
        crop=64,
        min_scale=0.5,
        degradation=degradation,
        degradation_group=2,
        hint_channels=(4, 8, 8, 8),
    )
    few_steps = FewStepConfig(
        loop=LoopConfig(**loop),
        crop=64,
        min_scale=0.5,
        degradation=degradation,
        hint_channels=(4, 8, 8, 8),
        deep_weight=0.0,
    )
    return NanoConfig(
        autoencoder=AutoencoderConfig(loop=LoopConfig(**loop), grow=(1, 1)),
        tagger=TaggerConfig(loop=LoopConfig(**loop), image_size=64, min_count=1, holdout_every=2, pretrained=False),
        dape=Stage1Config(loop=LoopConfig(**loop), crop=64, min_scale=0.0, degradation=degradation, samples=1),
        prior=PriorConfig(stage2=stage2, sizes=PriorSizes(channels=(64, 64), attention=(False, True), text_width=64)),
        control=stage2,
        few_steps=replace(few_steps, learns="denoiser"),
        decoder=replace(few_steps, learns="all"),
        texture=replace(few_steps, learns="all", critic_weight=0.25, critic_warmup=0),
        vocab_size=600,
        defaults=dict(NANO_DEFAULTS),
    )


NANO_RECIPES: Mapping[str, Callable[[], NanoConfig]] = {"nano": nano, "debug": debug}
