"""Which settings and facts make a run the same one when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from seesr_core.errors import DataError

from .loop_config import LoopConfig

_MAY_CHANGE = {
    "steps",
    "accumulation",
    "cache_pairs",
    "cache_teacher",
    "cache_texts",
    "compile",
    "compile_backend",
    "device",
    "keep_best",
    "keep_last",
    "log_every",
    "max_skipped",
    "offload_activations",
    "sample_every",
    "save_every",
    "timeout",
    "validation_cfg",
    "validation_color_fix",
    "validation_solver",
    "validation_start",
    "validation_steps",
    "wandb",
    "workers",
}
_NOT_RECORDED = {"tags", "lr", "mixture"}
"""Facts that older checkpoints do not have; they are compared where they are known."""
_DEFAULTS = {field.name: field.default for field in fields(LoopConfig) if field.default is not MISSING}
_ADDED = {"frozen_dtype": "fp32", "min_snr": 0.0}
"""Settings of stages that older checkpoints do not have, and what these runs did."""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, so that a difference between runs is named by the one setting it is in."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def check_same_run(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse another run's checkpoint; a setting that was not yet there when it was written had its default.

    Args:
        folder: of the run.
        before: facts in its checkpoint, nested settings under dotted names (`flat`).
        now: facts of the run that is to go on.

    Raises:
        DataError: they differ in what must stay; the sentence names each.
    """
    before = {**_DEFAULTS, **{name: value for name, value in _ADDED.items() if name in now}, **before}
    names = sorted((set(before) | set(now)) - _MAY_CHANGE - (_NOT_RECORDED - set(before)))
    pairs = {name: (_plain(before.get(name)), now.get(name)) for name in names}
    changed = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise DataError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}); use another folder for this."
        )


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
