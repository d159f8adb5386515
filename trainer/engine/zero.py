"""ZeRO 1 and 2 by DeepSpeed: gradients and moments are divided between the processes, the networks stay whole.

DeepSpeed reduces, clips and steps at the end of the last backward pass of a step. It is left in fp32, where it drops a
step whose gradients are not finite by itself and reports a norm of infinity, so that the loop's guard sees the same as
elsewhere. What is done here: it gets the recipe's settings, and moments are known by parameter in checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seesr_core.errors import SettingsError

from .state import State

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .loop_config import LoopConfig

_BUCKET = 50_000_000
"""Elements that are reduced or gathered at once; DeepSpeed's own choice takes 2 GB."""


def configure(accelerator: Accelerator, module: nn.Module, config: LoopConfig) -> None:
    """Give DeepSpeed what the recipe says; to be called before it takes over the module.

    Raises:
        SettingsError: the launcher's file asks for more than is done here, or the recipe has what DeepSpeed cannot do.
    """
    plugin: Any = accelerator.deepspeed_plugin
    if plugin.zero_stage not in (1, 2) or plugin.offload_optimizer_device not in (None, "none"):
        raise SettingsError(
            f"Of DeepSpeed, ZeRO-1 and ZeRO-2 on the GPUs are supported, got ZeRO-{plugin.zero_stage} with offloading "
            f"to {plugin.offload_optimizer_device}; trainer/accelerate/fsdp2.yaml shards the same as ZeRO-3."
        )
    if accelerator.mixed_precision != "no":
        raise SettingsError("DeepSpeed's file asks for half precision; leave it to the recipe (--loop.precision bf16).")
    if config.resolve_precision() == "fp16" or config.optimizer not in ("adamw", "adamw-fused"):
        raise SettingsError(
            "With DeepSpeed the precision must be fp32 or bf16 and the optimizer adamw or adamw-fused, got "
            f"{config.resolve_precision()} and {config.optimizer}; launch with trainer/accelerate/ddp.yaml for these."
        )
    settings = plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = config.micro_batch
    settings["gradient_accumulation_steps"] = config.accumulation
    settings["gradient_clipping"] = config.max_grad_norm
    settings["zero_optimization"] |= {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    module.forward = config.autocast()(module.forward)


@dataclass(slots=True)
class ZeroState(State):
    """As `State`, when each process has the moments of a slice of all parameters, laid end to end."""

    def moments(self, parameter: Tensor) -> Mapping[str, Any]:
        """The moments of a parameter, complete; every process has to ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found = self.optimizer.state.get(self._slice, {})
        return {
            key: value if key == "step" else safe_get_full_optimizer_state(parameter, key).cpu()
            for key, value in found.items()
        }

    def put(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Cut the slice of this process out of complete moments; DeepSpeed's copy of the weights follows them, too."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._zero.refresh_fp32_params()
        some = next(iter(moments.values()))
        if not some:
            return
        empty = {key: torch.zeros_like(self._slice) for key in some}
        self.optimizer.state[self._slice] = empty | {"step": self.placed("step", some["step"], self._slice)}
        self._zero._lazy_init_hp_params_optimizer_state()  # tells the parameters where their moments are
        for name, parameter in self.parameters.items():
            for key in some.keys() - {"step"}:
                safe_set_full_optimizer_state(parameter, moments[name][key].to(parameter.device), key)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which accelerate wraps."""
        return self.optimizer.optimizer  # type: ignore[attr-defined]

    @property
    def _slice(self) -> Tensor:
        """The parameters of this process; one tensor, since there is one group."""
        (flat,) = self._zero.single_partition_of_fp32_groups
        return flat
