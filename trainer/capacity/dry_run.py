"""What a run will take, before it begins: parameters, memory by part, images, and hours at a measured rate."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..data.photos import Photo
from ..engine.journal import Figures
from ..engine.loop import Task
from ..engine.loop_config import LoopConfig
from ..engine.optimizers import moment_bytes
from ..engine.processes import process_count
from .live_memory import LiveBytes

log = logging.getLogger(__name__)

GIB = 2**30
_FEW = 2
"""Images of the passes that are measured, where the run's are larger."""
_CPU_ATTENTION: Any = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""Attention as torch computes it on CPUs, which torch's own table leaves out."""


@dataclass(kw_only=True, slots=True)
class DryRun:
    """The figures of a dry run."""

    trained: int
    """Parameters with gradients."""
    frozen: int
    """Parameters without gradients."""
    memory: Mapping[str, int]
    """Bytes on each process by part; `activations` is all that a pass needs beside weights and gradients, at most."""
    checkpoint: int
    """Bytes of one checkpoint."""
    photos: int
    """Photos to draw from; 0 if unknown."""
    photo_bytes: float
    """Mean size of a photo's file."""
    flops: float
    """Floating-point operations an image, forward and backward."""
    images_per_second: float
    """Measured on this machine, over all processes, optimizer included; the second of two steps."""
    config: LoopConfig
    """The loop's settings that were planned."""

    @property
    def images(self) -> int:
        """Images that the run sees."""
        return self.config.steps * self.config.batch_size

    @property
    def hours(self) -> float:
        """Hours that the run takes at the measured rate."""
        return self.images / self.images_per_second / 3600

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        config, total = self.config, sum(self.memory.values())
        epochs = f", {self.images / self.photos:.1f} epochs of {self.photos:,} photos" if self.photos else ""
        parts = [f"  {name:<12}{size / GIB:9.3f} GiB" for name, size in self.memory.items()]
        return [
            f"parameters: {self.trained:,} trained, {self.frozen:,} frozen",
            "memory of each process:",
            *parts,
            f"  {'total':<12}{total / GIB:9.3f} GiB",
            f"checkpoint: {self.checkpoint / GIB:.3f} GiB every {config.save_every} steps",
            f"steps: {config.steps:,} of {config.batch_size} images ({process_count()} processes × accumulation "
            f"{config.accumulation} × {config.micro_batch}); {self.images:,} images{epochs}",
            f"arithmetic: {self.flops / 1e12:.4f} TFLOP an image",
            f"rate: {self.images_per_second:.3f} images/s here, in passes of {min(_FEW, config.micro_batch)}; reads "
            f"{self.images_per_second * self.photo_bytes / 1e6:.3f} MB/s of photos",
            f"hours: {self.hours:.2f} at this rate",
        ]


def dry_run(task: Task, config: LoopConfig) -> DryRun:
    """Run two passes and an optimizer step that changes nothing, and measure them."""
    trained = [p for p in task.trained.parameters() if p.requires_grad]
    everything = [task.trained, *getattr(task, "frozen", ())]
    frozen = unique(p for module in everything for p in module.parameters() if not p.requires_grad)
    offload = config.offload_activations
    activations, flops = cost_of_pass(lambda: _pass(task, config, 0)[0], [*trained, *frozen], offload=offload)
    seconds = _timed_step(task, config, trained)
    weights, gradients = bytes_of(frozen) + bytes_of(trained), bytes_of(trained)
    moments = round(sum(p.numel() for p in trained) * moment_bytes(config.optimizer))
    average = gradients if config.ema else 0
    memory = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": moments,
        "average": average,
        "activations": activations,
    }
    paths = [photo.path for photo in getattr(task, "photos", ())]
    return DryRun(
        trained=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in frozen),
        memory=memory,
        checkpoint=bytes_of(trained) + moments + average,
        photos=len(paths),
        photo_bytes=_mean_size(paths),
        flops=flops / config.micro_batch,
        images_per_second=config.micro_batch * process_count() / seconds,
        config=config,
    )


def small_dry_run(build: Callable[[LoopConfig], Task], config: LoopConfig) -> DryRun:
    """As `dry_run`, from passes of one and of two images, which tell what each further one adds.

    Args:
        build: makes the task for a loop of another batch size.
        config: what is planned.
    """
    if config.micro_batch <= _FEW:
        return dry_run(build(config), config)
    few = [replace(config, batch_size=images * config.parts) for images in (1, _FEW)]
    one, two = (dry_run(build(loop), loop) for loop in few)
    each = two.memory["activations"] - one.memory["activations"]
    activations = one.memory["activations"] + (config.micro_batch - 1) * each
    return replace(two, memory={**two.memory, "activations": activations}, config=config)


def sample(photos: Sequence[Photo], most: int = 100) -> list[Photo]:
    """Some of the photos, evenly from all over the list, so that a dry run does not open them all."""
    return list(photos[:: -(-len(photos) // most)])


def show(planned: DryRun) -> None:
    """Log the dry run line by line."""
    for line in planned.lines():
        log.info("%s", line)


def _pass(task: Task, config: LoopConfig, part: int) -> tuple[Tensor, Figures]:
    with config.autocast():
        return task.loss(part)


def cost_of_pass(loss: Callable[[], Any], parameters: Iterable[Tensor], *, offload: bool = False) -> tuple[int, int]:
    """Bytes that a forward and backward pass takes at most, beside the parameters and their gradients; and its
    arithmetic, in floating-point operations of matrix products and convolutions. A result that needs no gradients has
    no backward pass; with `offload` what it needs waits in another memory."""
    parameters = list(parameters)
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:  # gradients that are there already are added to, and not counted
            parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    # One after the other: torch's counter of operations keeps tensors alive that a pass lets go.
    with LiveBytes([*parameters, *gradients]) as memory, memory.elsewhere() if offload else nullcontext():
        _there_and_back(loss)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        _there_and_back(loss)
    for parameter in parameters:
        parameter.grad = None
    return memory.peak, counter.get_total_flops()


def _there_and_back(loss: Callable[[], Any]) -> None:
    result = loss()
    if isinstance(result, Tensor) and result.requires_grad:
        result.backward()


def _timed_step(task: Task, config: LoopConfig, trained: Iterable[nn.Parameter]) -> float:
    """Seconds of a pass with its share of the optimizer step; weights are scaled by 1 and moved by 0."""
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    start = _now(config)
    _pass(task, config, 1)[0].backward()
    middle = _now(config)
    optimizer.step()
    end = _now(config)
    optimizer.zero_grad(set_to_none=True)
    return middle - start + (end - middle) / config.accumulation


def _now(config: LoopConfig) -> float:
    if config.resolve_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def unique(parameters: Iterable[Any]) -> list[Any]:
    """Each of them once, though networks share some."""
    return list({id(p): p for p in parameters}.values())


def bytes_of(parameters: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(p.numel() * p.element_size() for p in parameters)


def _mean_size(paths: list[Path]) -> float:
    sizes = [path.stat().st_size for path in paths[:: max(1, math.ceil(len(paths) / 1000))] if path.is_file()]
    return sum(sizes) / len(sizes) if sizes else 0.0
