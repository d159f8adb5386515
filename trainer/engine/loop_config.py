"""How a stage is optimised: the settings that all stages share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from seesr_core.errors import SettingsError

from .processes import local_device, process_count

PRECISIONS = ("fp32", "bf16", "fp16", "mixed")
COMPILED = ("none", "frozen", "trained", "all")


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """How a stage is optimised."""

    steps: int
    """Number of optimizer steps."""
    batch_size: int
    """Images per step, over all processes and accumulated parts."""
    learning_rate: float
    """Peak learning rate of the optimizer."""
    accumulation: int = 1
    """Parts into which each process cuts its share of the batch, so that it fits into memory."""
    optimizer: str = "adamw"
    """`adamw`, `adamw-fused`, `adamw-8bit` (bitsandbytes), or the import path of a class such as `lion_pytorch.Lion`,
    `prodigyopt.Prodigy` (with a learning rate of 1) or `schedulefree.AdamWScheduleFree`."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: str = "constant"
    """After the warm-up: `constant`, or `cosine` down to a tenth."""
    milestones: tuple[int, ...] = ()
    """Steps at which the learning rate is halved."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    max_skipped: int = 10
    """Steps in a row whose gradients are not finite that are skipped; one more ends the run."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is exported; 0 turns it off."""
    precision: str = "fp32"
    """`fp32`, or `bf16` or `fp16` (autocast; fp16 with loss scaling), or `mixed`: bf16 where the device computes in it,
    else fp16."""
    tf32: bool = False
    """Whether matrix products in fp32 may round their inputs to TF32 on GPUs that can."""
    compile: str = "none"
    """What torch.compile compiles: `none`, the `frozen` networks, the `trained` ones, or `all`. Dropout is then drawn
    by the part of the batch, so a network that has some (stage 1) depends on how the batch is divided."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    offload_activations: bool = False
    """Whether what the backward pass needs waits in the CPU's memory: less memory on a GPU, more time. Values stay."""
    device: str = "auto"
    """Device to train on: `auto`, `cpu`, `cuda`, …"""
    workers: int = 0
    """Threads that read and crop the photos of the next batches; 0 does it between the steps."""
    timeout: int = 1800
    """Seconds that processes wait for each other."""
    seed: int = 0
    """Seed that everything random derives from."""
    log_every: int = 10
    """Steps between lines in `log.jsonl`."""
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 1000
    """Steps between sample pictures and validations; 0 for none."""
    keep_last: int = 2
    """Checkpoints that are kept, so that a damaged one does not cost the run."""
    keep_best: bool = True
    """Whether the checkpoint with the best validation loss is kept as well."""
    wandb: str = ""
    """Project of Weights & Biases to log to, beside `log.jsonl` and TensorBoard."""

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.accumulation, self.log_every, self.save_every, self.keep_last)
        if min(counts) < 1:
            raise SettingsError(
                "steps, batch_size, accumulation, log_every, save_every and keep_last must be at least 1."
            )
        _one_of("decay", self.decay, ("constant", "cosine"))
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("compile", self.compile, COMPILED)
        if not 0 <= self.ema < 1:
            raise SettingsError(f"ema must be in [0, 1), got {self.ema}.")

    @property
    def micro_batch(self) -> int:
        """Images per forward pass.

        Raises:
            SettingsError: the batch cannot be divided so.
        """
        parts = self.parts
        if self.batch_size % parts:
            raise SettingsError(
                f"A batch of {self.batch_size} images cannot be divided among {process_count()} processes × "
                f"accumulation {self.accumulation}. Choose a batch size that is a multiple of {parts}."
            )
        return self.batch_size // parts

    @property
    def parts(self) -> int:
        """Forward passes per step, over all processes."""
        return self.accumulation * process_count()

    def images(self, part: int) -> range:
        """The numbers of the images of a forward pass."""
        return range(part * self.micro_batch, (part + 1) * self.micro_batch)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (counted from 0)."""
        rate = self.learning_rate * min(1.0, (step + 1) / self.warmup if self.warmup else 1.0)
        rate *= 0.5 ** sum(step >= milestone for milestone in self.milestones)
        if self.decay == "cosine":
            rate *= 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return rate

    def resolve_device(self) -> torch.device:
        """The device that `auto` stands for."""
        return local_device() if self.device == "auto" else torch.device(self.device)

    def resolve_precision(self) -> str:
        """The precision that `mixed` stands for on the device, or the one that is set."""
        if self.precision != "mixed":
            return self.precision
        half = self.resolve_device().type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if half else "fp16"

    def autocast(self) -> torch.autocast:
        """The context in which a pass is computed in the run's precision."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.resolve_precision())
        return torch.autocast(self.resolve_device().type, kind, enabled=kind is not None)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed[:-1])
        raise SettingsError(f"{name} must be {choices} or {allowed[-1]!r}, got {value!r}.")
