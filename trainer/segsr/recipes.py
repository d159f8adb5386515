"""Recipes of SegSR, a reconstruction: what each is for, what to expect of it, and the command that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from seesr_core.method.schedule import Spacing, timesteps
from seesr_core.segsr.labels import Embedding
from seesr_core.settings import UpscaleSettings

from ..data.stage_config import require
from ..degradation import DegradationConfig, SharpenConfig
from ..engine.loop_config import LoopConfig
from ..stage2.recipes import Stage2Config

Mode = Literal["joint", "apart", "segmenter"]


@dataclass(kw_only=True, slots=True)
class SegSRTrainConfig(Stage2Config):
    """How SegSR is trained around a frozen SeeSR model."""

    trained: Literal["image-encoder", "lora"] = "image-encoder"
    """What of the ControlNet learns beside SegDM and bridge: its image encoder, or adapters on its transformers too."""
    mode: Mode = "joint"
    """`joint` is the method. To compare with: `apart` leaves the bridge out; `segmenter` trains SegDM alone to answer
    at once, without noise and without steps."""
    widths: tuple[int, ...] = (96, 192, 256)
    """Channels of SegDM's levels."""
    token_channels: int = 32
    """What the tagger's tokens are narrowed to."""
    bridge_width: int = 64
    """Channels within the bridge."""
    label_scale: float = 0.5
    """Size of a label bit in the segmentation's latent."""
    embedding: Embedding = "bits"
    """How a class is written there: as analog bits, ⌈log2 K⌉ channels, or as a channel of its own."""
    label_weight: float = 1.0
    """Weight λ of the segmentation's loss."""
    own: float = 0.75
    """Probability p that an image comes to its timestep through passes of the networks themselves, without gradients,
    as in sampling; else from the true latents, noised."""
    unroll: int = 1
    """Most passes that it comes through; so many steps of the sampling grid further up it begins."""
    steps: int = 50
    """Steps of the sampling grid that is trained on; becomes a default of the exported file, like the next three."""
    spacing: Spacing = "leading"
    """How they lie in the schedule."""
    start_timestep: int = 999
    """Noise level of the LR start."""
    cfg: float = 5.5
    """Guidance scale of sampling; training has none."""

    def __post_init__(self) -> None:
        Stage2Config.__post_init__(self)
        require(self.trained in ("image-encoder", "lora"), "trained must be 'image-encoder' or 'lora'", self.trained)
        require(self.mode in ("joint", "apart", "segmenter"), "mode must be 'joint', 'apart' or 'segmenter'", self.mode)
        written = self.embedding in ("bits", "one-hot")
        require(written, "embedding must be 'bits' or 'one-hot'", self.embedding)
        require(0 <= self.own <= 1, "own must lie in [0, 1]", self.own)
        require(self.unroll >= 1, "unroll must be at least 1", self.unroll)
        require(self.label_weight > 0, "label_weight must be positive", self.label_weight)
        require(
            not self.cache_pairs, "cache_pairs knows nothing of labels: leave it off and set pool", self.cache_pairs
        )

    def sampling(self) -> dict[str, Any]:
        """The settings of sampling, by the names of `UpscaleSettings`; both processes step alike, so DDIM it is."""
        names = ("steps", "spacing", "start_timestep", "cfg")
        found = {**Stage2Config.sampling(self), "solver": "ddim", **{name: getattr(self, name) for name in names}}
        UpscaleSettings.for_model(found)
        return found

    def grid(self) -> list[int]:
        """The timesteps that are trained on, falling."""
        return timesteps(self.steps, spacing=self.spacing, start_timestep=self.start_timestep)


def segsr() -> SegSRTrainConfig:
    """SegSR around published SeeSR weights.

    Reproduces: nothing published; the sizes and the settings are ours.
    Expected: not measured at full size.
    Hardware: one GPU of 24 GB, planned by `python -m trainer.scale --recipe segsr` (docs/semantics.md); not run yet.
    Command: python -m trainer.segsr --recipe segsr --data photos --masks labels --base sd-2-base
        --dape dape.safetensors --seesr seesr.safetensors --out runs/segsr
    """
    loop = LoopConfig(
        steps=50_000,
        batch_size=32,
        accumulation=16,
        learning_rate=1e-4,
        warmup=500,
        ema=0.999,
        precision="bf16",
        tf32=True,
        save_every=1000,
        sample_every=2000,
        workers=4,
    )
    return SegSRTrainConfig(loop=loop, smallest_photo=512, gradient_checkpointing=True)


def segsr_nano() -> SegSRTrainConfig:
    """The toy of the method that is shipped: around the embedded small model, on drawn scenes.

    Reproduces: `seesr_core/nano/segsr/segsr-nano.safetensors`, from `python -m trainer.segsr.scenes`.
    Expected: the table in docs/semantics.md.
    Hardware: one CPU core; a few minutes.
    Command: python -m trainer.segsr --recipe segsr-nano --data scenes --masks scenes/labels --out runs/segsr-nano
    """
    loop = LoopConfig(
        steps=240,
        batch_size=8,
        learning_rate=1.5e-3,
        warmup=10,
        decay="cosine",
        ema=0.98,
        log_every=20,
        save_every=40,
        sample_every=240,
    )
    return SegSRTrainConfig(
        loop=loop,
        crop=64,
        hint_channels=(16, 32, 64, 128),
        trained="lora",
        widths=(48, 96, 128),
        token_channels=16,
        bridge_width=32,
        lora_rank=8,
        pool=30,
        steps=10,
        spacing="trailing",
        start_timestep=299,
        cfg=1.0,
        own=0.7,
    )


def segsr_debug() -> SegSRTrainConfig:
    """Four steps of batch 2 on 64² crops: every part in seconds on a CPU, for tests and first attempts.

    Reproduces: nothing.
    Expected: `segsr.safetensors`, four lines in `log.jsonl` and two sample pictures.
    Hardware: any CPU; seconds.
    Command: python -m trainer.segsr --recipe debug --data scenes --masks scenes/labels --out runs/debug
    """
    loop = LoopConfig(
        steps=4, batch_size=2, learning_rate=1e-3, device="cpu", log_every=1, save_every=2, sample_every=2
    )
    degradation = DegradationConfig(sharpen=SharpenConfig(radius=7, fast=True), quantize=True)
    return SegSRTrainConfig(
        loop=loop,
        crop=64,
        min_scale=0.5,
        degradation=degradation,
        degradation_group=2,
        hint_channels=(4, 8, 8, 8),
        trained="lora",
        widths=(16, 32),
        token_channels=8,
        bridge_width=8,
        lora_rank=2,
        steps=4,
        spacing="trailing",
        cfg=1.0,
        own=0.5,
    )


SEGSR_RECIPES: Mapping[str, Callable[[], SegSRTrainConfig]] = {
    "segsr": segsr,
    "segsr-nano": segsr_nano,
    "debug": segsr_debug,
}
