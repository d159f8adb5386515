"""Optimizers by name or by the import path of their class, and what they keep for each parameter."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seesr_core.errors import SettingsError

NAMED = {"adamw": 8, "adamw-fused": 8, "adamw-8bit": 2}
"""Optimizers by name, and the bytes that each keeps for a parameter."""
_FEW = 64
"""Side of the square of parameters by which the memory of others is told."""


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`adamw`; `adamw-fused`, one kernel for all parameters; `adamw-8bit`, a quarter of the memory for its moments; or
    the class of an import path such as `lion_pytorch.Lion`, with its own settings but for learning rate and weight
    decay.

    Raises:
        SettingsError: an unknown name, or a path that leads to no optimizer.
    """
    if name == "adamw-8bit":
        return _adamw_8bit(parameters, learning_rate, weight_decay)
    if "." in name:
        return _imported(name, parameters, learning_rate, weight_decay)
    if name not in NAMED:
        raise SettingsError(
            f"optimizer must be {', '.join(map(repr, NAMED))} or the import path of a class such as "
            f"'lion_pytorch.Lion', got {name!r}."
        )
    fused = True if name == "adamw-fused" else None
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def check_optimizer(name: str) -> None:
    """Refuse a name that stands for no optimizer, or one whose package is missing.

    Raises:
        SettingsError: it does.
    """
    if name != "adamw-8bit":
        build_optimizer(name, [nn.Parameter(torch.zeros(1))], learning_rate=1e-4, weight_decay=0.0)


def moment_bytes(name: str) -> float:
    """Bytes that an optimizer keeps for each parameter in fp32; that of an import path takes a step to tell."""
    if name in NAMED:
        return NAMED[name]
    parameter = nn.Parameter(torch.ones(_FEW, _FEW))
    optimizer = build_optimizer(name, [parameter], learning_rate=1e-4, weight_decay=0.0)
    begin(optimizer)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = (value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    return sum(value.nbytes for value in kept if value.numel() > 1) / parameter.numel()


def begin(optimizer: Any) -> None:
    """Tell an optimizer that training begins; those without a schedule of their own keep two kinds of weights."""
    if has_modes(optimizer):
        optimizer.train()


def finish(optimizer: Any) -> None:
    """Let the parameters be those that an optimizer without a schedule of its own means for use."""
    if has_modes(optimizer):
        optimizer.eval()


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer, or the one that accelerate wraps, keeps other weights for use than for training."""
    return hasattr(getattr(optimizer, "optimizer", optimizer), "eval")


def counters(optimizer: torch.optim.Optimizer) -> dict[str, float | bool | int]:
    """What an optimizer counts beside its moments, for all parameters together, such as Prodigy's estimate `d`."""
    group = optimizer.param_groups[0]
    kept = ((name, value) for name, value in group.items() if name not in ("params", "lr"))
    plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in kept}
    # What is infinite is a setting that is off, and no JSON.
    return {name: v for name, v in plain.items() if isinstance(v, bool | int | float) and math.isfinite(v)}


def count_from(optimizer: torch.optim.Optimizer, found: Mapping[str, Any]) -> None:
    """Put back what `counters` gave."""
    for group in optimizer.param_groups:
        group.update({name: value for name, value in found.items() if name in group})


def _imported(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    module, _, class_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), class_name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"optimizer {name!r} cannot be imported ({error}); install its package, or correct the path."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise SettingsError(f"optimizer {name!r} is no torch.optim.Optimizer but {found!r}; name the class.")
    decay = {"weight_decay": weight_decay} if "weight_decay" in inspect.signature(found).parameters else {}
    make: Any = found
    optimizer: torch.optim.Optimizer = make(parameters, lr=learning_rate, **decay)
    return optimizer


def _adamw_8bit(parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
    return optimizer
