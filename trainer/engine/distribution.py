"""How the images of a step are divided, and what the processes of a run do together; accelerate does the work.

The global batch defines a recipe. Its images are cut into parts of `LoopConfig.micro_batch`; process r computes the
parts r, r + N, r + 2N … and gradients are averaged over all of them, so the number N changes nothing but rounding.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from seesr_core.errors import SettingsError

from .journal import Figures
from .processes import is_zero, process_count

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .loop_config import LoopConfig

DEEPSPEED = "0.19.8"
"""The version since which steps that are not finite are known to be skipped in fp32."""


class Computes(Protocol):
    """What `Pass` needs of a task."""

    @property
    def trained(self) -> nn.Module:
        """Holds the trained parameters."""

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """The loss of a part of a batch."""


class Pass(nn.Module):
    """A task's loss as the forward pass of a module, which is what data parallelism wraps."""

    def __init__(self, task: Computes, offload_activations: bool = False) -> None:
        super().__init__()
        self.task, self.trained, self.offload_activations = task, task.trained, offload_activations

    def forward(self, number: int) -> tuple[Tensor, Figures]:
        """Loss and figures of part `number`."""
        if not self.offload_activations:
            return self.task.loss(number)
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return self.task.loss(number)


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
    precision = config.resolve_precision()
    if precision == "fp16" and device.type == "cpu":
        raise SettingsError("The precision fp16 needs a GPU; choose bf16 or fp32 on a CPU.")
    if zero and not (is_deepspeed_available() and compare_versions("deepspeed", ">=", DEEPSPEED)):
        raise SettingsError(f"The launcher asks for DeepSpeed: `pip install 'deepspeed>={DEEPSPEED}'`.")
    # The state is shared by all accelerators of a process; a second run may have another precision or device.
    AcceleratorState._reset_state(reset_partial_state=process_count() == 1)
    # Told to use a CPU, accelerate leaves DeepSpeed out; with a backend's name it finds the processes all the same.
    over = {"backend": "gloo"} if zero and device.type == "cpu" else {}
    return Accelerator(
        mixed_precision="no" if zero or precision == "fp32" else precision,
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
