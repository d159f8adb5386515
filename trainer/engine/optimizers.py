"""Optimizers by name, and learning rates by step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from seesr_core.errors import SettingsError

OptimizerName = Literal["adamw", "adamw-fused", "adamw-8bit"]


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`adamw`; `adamw-fused`, one kernel for all parameters; `adamw-8bit`, a quarter of the memory for its moments.

    Raises:
        SettingsError: an unknown name.
    """
    if name == "adamw-8bit":
        return _adamw_8bit(parameters, learning_rate, weight_decay)
    if name not in ("adamw", "adamw-fused"):
        raise SettingsError(f"optimizer must be 'adamw', 'adamw-fused' or 'adamw-8bit', got {name!r}.")
    fused = True if name == "adamw-fused" else None
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def _adamw_8bit(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    return optimizer
