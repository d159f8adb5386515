"""What stage 2 takes at full size on machines that are not at hand: a dry run on shapes alone.

    python -m trainer.scale --recipe paper --gpus 8 --memory 24 --tflops 165

Networks of SD-2's size are built without contents, and passes of one and of two images are counted: arithmetic, and
the most that lives at once. From these follow the batch layout that fits, and the hours at a stated share of the
cards' peak. No weights, photos or GPU are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from seesr_core.errors import SettingsError

from ..distill.recipes import DISTILL_RECIPES, DistillConfig
from ..engine import command
from ..engine.frozen import check_frozen
from ..engine.optimizers import moment_bytes
from ..segsr.recipes import SEGSR_RECIPES, SegSRTrainConfig
from ..stage2.recipes import STAGE2_RECIPES, Stage2Config
from .counting import ADAPTERS, BYTES, Counted, count, count_segsr, count_student
from .dry_run import GIB

log = logging.getLogger(__name__)

RECIPES: dict[str, Callable[[], Any]] = {**DISTILL_RECIPES, **STAGE2_RECIPES, "segsr": SEGSR_RECIPES["segsr"]}
"""Recipes of stage 2, of students, and of SegSR."""


@dataclass(kw_only=True)
class ScaleCommand(command.RecipeCommand):
    """Plan stage 2 on other machines. The flags below override the recipe."""

    config: Annotated[Stage2Config, command.SETTINGS]
    """Settings that override the recipe's."""
    gpus: int = 8
    """Number of GPUs in all machines together."""
    nodes: int = 1
    """Number of machines."""
    memory: float = 80.0
    """Memory of each GPU in GiB."""
    tflops: float = 312.0
    """Peak of a GPU in the recipe's precision: 312 for an A100, 165 for an RTX 4090 (both bf16)."""
    utilisation: float = 0.35
    """Share of the peak that is reached; an assumption."""
    reserve: float = 2.0
    """GiB of each GPU left for its driver, kernels and fragments."""
    shard: bool = False
    """FSDP2: weights, gradients and moments of U-Net and ControlNet are divided between the GPUs."""
    link: float = 10.0
    """Rate at which a machine sends to the others, in GB/s."""
    photo: float = 1.0
    """Size of a photo's file in MB."""
    disk: float = 1.0
    """Rate at which a checkpoint is written, in GB/s."""

    def __post_init__(self) -> None:
        numbers = (self.gpus, self.nodes, self.memory, self.tflops, self.link, self.photo, self.disk)
        if min(numbers) <= 0 or not 0 < self.utilisation <= 1 or self.gpus % self.nodes:
            raise SettingsError(
                "gpus, nodes, memory, tflops, link, photo and disk must be above 0, utilisation at most 1, and gpus a "
                f"multiple of nodes; found {numbers} and {self.utilisation}."
            )


@dataclass(kw_only=True, slots=True)
class Layout:
    """How a step's images are divided."""

    images: int
    """Images in a pass."""
    accumulation: int
    """Passes of each process."""


def layout(options: ScaleCommand, counted: Counted) -> Layout:
    """The largest passes that fit and divide the batch.

    Raises:
        SettingsError: the batch cannot be divided between the GPUs, or not even one image fits.
    """
    share, rest = divmod(options.config.loop.batch_size, options.gpus)
    if rest:
        raise SettingsError(
            f"A batch of {options.config.loop.batch_size} images cannot be divided between {options.gpus} GPUs; choose "
            "a batch size that is a multiple."
        )
    room, shards = (options.memory - options.reserve) * GIB, options.gpus if options.shard else 1
    for images in range(share, 0, -1):
        if share % images == 0 and sum(counted.memory(images, options.config, shards).values()) <= room:
            return Layout(images=images, accumulation=share // images)
    least = sum(counted.memory(1, options.config, shards).values()) / GIB
    raise SettingsError(
        f"One image a pass takes {least:.1f} GiB and {room / GIB:.1f} GiB are there; choose 8-bit moments "
        "(--loop.optimizer adamw-8bit), half precision (--loop.precision mixed, --frozen-dtype bf16), "
        "--gradient-checkpointing, --loop.offload-activations or --shard."
    )


def lines(options: ScaleCommand, counted: Counted) -> list[str]:
    """The plan as text."""
    config, chosen = options.config, layout(options, counted)
    memory = counted.memory(chosen.images, config, options.gpus if options.shard else 1)
    batch, steps = config.loop.batch_size, config.loop.steps
    flops = batch * (counted.trained_flops + counted.frozen_flops)
    compute = flops / (options.gpus * options.tflops * 1e12 * options.utilisation)
    sending = _traffic(options, counted, chosen) / (options.link * 1e9) if options.nodes > 1 else 0.0
    seconds = max(compute, sending)  # gradients travel while others are computed
    rate = batch / seconds
    checkpoint = (BYTES * (2 if config.loop.ema else 1) + moment_bytes(config.loop.optimizer)) * counted.trained
    parts = "  ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items() if size)
    limit = "the links between the machines" if sending > compute else "arithmetic"
    return [
        f"parameters: {counted.trained / 1e6:,.1f} M trained, {counted.steered / 1e6:,.1f} M in U-Net and ControlNet, "
        f"{counted.frozen / 1e6:,.1f} M in the frozen networks",
        f"arithmetic: {counted.trained_flops / 1e12:.2f} TFLOP an image forward and backward, "
        f"{counted.frozen_flops / 1e12:.2f} in frozen networks",
        f"layout: {options.gpus} GPUs × accumulation {chosen.accumulation} × {chosen.images} images",
        f"GiB of each GPU: {parts}  total {sum(memory.values()) / GIB:.2f} of {options.memory:g}",
        f"each further image a pass: {counted.per_image / GIB:.2f} GiB",
        f"rate: {rate:.1f} images/s at {options.utilisation:.0%} of {options.tflops:g} TFLOPS a GPU; "
        f"{seconds:.2f} s a step",
        f"reads: {rate * options.photo:.0f} MB/s of photos of {options.photo:g} MB",
        f"gradients: {sending:.2f} s a step between machines at {options.link:g} GB/s",
        f"checkpoint: {checkpoint / GIB:.2f} GiB, {checkpoint / (options.disk * 1e9):.0f} s at {options.disk:g} GB/s, "
        f"every {config.loop.save_every * seconds / 60:.0f} minutes",
        f"hours: {steps * seconds / 3600:.0f} for {steps:,} steps of {batch} images",
        f"limited by: {limit}",
    ]


def _traffic(options: ScaleCommand, counted: Counted, chosen: Layout) -> float:
    """Bytes that each machine sends in a step: a ring passes nearly twice the gradients; sharded weights are gathered
    for both directions of every pass besides."""
    gathered = 2 * chosen.accumulation * counted.steered if options.shard else 0
    return BYTES * (2 * counted.trained + gathered) * (options.gpus - 1) / options.gpus


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: run(command.parse(ScaleCommand, RECIPES, argv, prog="python -m trainer.scale")))


def run(options: ScaleCommand) -> None:
    """Log the found."""
    if options.config.trained == "lora":
        raise SettingsError(ADAPTERS)
    check_frozen(options.config.frozen_dtype)
    for line in lines(options, _counted(options.config)):
        log.info("%s", line)


def _counted(config: Stage2Config) -> Counted:
    if isinstance(config, DistillConfig):
        return count_student(config)
    return count_segsr(config) if isinstance(config, SegSRTrainConfig) else count(config)
