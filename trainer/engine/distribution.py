"""How the images of a step are divided, and what the processes of a run do together; accelerate does the work.

The global batch defines a recipe. Its images are cut into parts of `LoopConfig.micro_batch`; process r computes the
parts r, r + N, r + 2N … and gradients are averaged over all of them, so the number N changes nothing but rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from seesr_core.errors import SettingsError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .loop import LoopConfig

DEEPSPEED = "0.19.8"
"""The version since which steps that are not finite are known to be skipped in fp32."""


class Computes(Protocol):
    """What `Pass` needs of a task."""

    @property
    def trained(self) -> nn.Module:
        """Holds the trained parameters."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """The loss of a part of a batch."""


class Pass(nn.Module):
    """A task's loss as the forward pass of a module, which is what data parallelism wraps."""

    def __init__(self, task: Computes) -> None:
        super().__init__()
        self.task, self.trained = task, task.trained

    def forward(self, number: int) -> tuple[Tensor, Mapping[str, float]]:
        """Loss and figures of part `number`."""
        return self.task.loss(number)


def process_count() -> int:
    """How many processes the launcher (`accelerate launch`, `torchrun`) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """Whether accelerate's launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def refuse_sharded_adapters() -> None:
    """For what trains adapters.

    Raises:
        SettingsError: the launcher asks for FSDP.
    """
    if is_sharded():
        raise SettingsError(
            "The launcher shards the networks (FSDP), but adapters are merged on whole ones. They have few gradients, "
            "so launch with trainer/accelerate/ddp.yaml."
        )


def is_zero() -> bool:
    """Whether accelerate's launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def is_main_process() -> bool:
    """Whether this is the process that writes; there is one for all machines."""
    return os.environ.get("RANK", "0") == "0"


def local_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def make_accelerator(config: LoopConfig) -> Accelerator:
    """accelerate set up for a recipe: its precision and accumulation; processes and sharding are the launcher's.

    Raises:
        SettingsError: the precision is not for this device, or DeepSpeed is asked for and missing or too old.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        compare_versions,
        is_deepspeed_available,
    )

    device, zero = config.resolve_device(), is_zero()
    if config.precision == "fp16" and device.type == "cpu":
        raise SettingsError("The precision fp16 needs a GPU; choose bf16 or fp32 on a CPU.")
    if zero and not (is_deepspeed_available() and compare_versions("deepspeed", ">=", DEEPSPEED)):
        raise SettingsError(f"The launcher asks for DeepSpeed: `pip install 'deepspeed>={DEEPSPEED}'`.")
    # The state is shared by all accelerators of a process; a second run may have another precision or device.
    AcceleratorState._reset_state(reset_partial_state=process_count() == 1)
    # Told to use a CPU, accelerate leaves DeepSpeed out; with a backend's name it finds the processes all the same.
    over = {"backend": "gloo"} if zero and device.type == "cpu" else {}
    return Accelerator(
        mixed_precision="no" if zero or config.precision == "fp32" else config.precision,
        cpu=device.type == "cpu" and not zero,
        device_placement=False,
        step_scheduler_with_optimizer=False,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation, sync_each_batch=False),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout), **over)],
    )


def gathered(accelerator: Accelerator, item: Any) -> list[Any]:
    """What every process holds as `item`, in the order of their ranks."""
    from accelerate.utils import gather_object

    items: list[Any] = gather_object([item])
    return items


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over the processes, complete; every process has to ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within the block, parts of a sharded model can be called by themselves; every process has to ask."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a complete `value` into a tensor that may be sharded."""
    tensor.copy_(like(value, tensor))


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A complete `value` placed, and sharded if need be, as `tensor` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value
