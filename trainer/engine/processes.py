"""What the launcher says about the processes of a run, and the device of this one; no process group is needed."""

from __future__ import annotations

import os

import torch

from seesr_core.errors import SettingsError


def process_count() -> int:
    """How many processes the launcher (`accelerate launch`, `torchrun`) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_alone_against_its_config() -> bool:
    """Whether accelerate was asked for several processes and started this one alone, as it does with MULTI_CPU."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    return launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ


def is_sharded() -> bool:
    """Whether accelerate's launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def refuse_sharded_adapters() -> None:
    """Refuse FSDP for what trains adapters.

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
