"""The training loop that every stage shares, readable from top to bottom.

All that is random in a step derives from (seed, step), and a checkpoint holds weights, optimizer and the step. The same
command therefore goes on after an interruption with the losses of an uninterrupted run, in fp32 on one machine bit for
bit.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from seesr_core.errors import DataError, SettingsError
from seesr_core.files import atomic_write

from .data import scoped_seed

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """How a stage is optimised."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Images per step."""
    learning_rate: float
    """Peak learning rate of AdamW."""
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
    ema: float = 0.0
    """Decay of the moving average of the weights that is exported; 0 turns it off."""
    precision: str = "fp32"
    """`fp32`, or `bf16` (autocast)."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, …"""
    seed: int = 0
    """Everything random derives from it."""
    log_every: int = 10
    """Steps between lines in `log.jsonl`."""
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 1000
    """Steps between sample pictures; 0 for none."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.log_every, self.save_every) < 1:
            raise SettingsError("steps, batch_size, log_every and save_every must be at least 1.")
        if self.decay not in ("constant", "cosine"):
            raise SettingsError(f"decay must be 'constant' or 'cosine', got {self.decay!r}.")
        if self.precision not in ("fp32", "bf16"):
            raise SettingsError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}.")
        if not 0 <= self.ema < 1:
            raise SettingsError(f"ema must be in [0, 1), got {self.ema}.")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (counted from 0)."""
        rate = self.learning_rate * min(1.0, (step + 1) / self.warmup if self.warmup else 1.0)
        rate *= 0.5 ** sum(step >= milestone for milestone in self.milestones)
        if self.decay == "cosine":
            rate *= 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return rate

    def resolve_device(self) -> torch.device:
        """The device that `auto` stands for."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Task(Protocol):
    """What a stage has to offer to the loop."""

    @property
    def trained(self) -> nn.Module:
        """Holds every trained parameter (frozen ones have `requires_grad=False` and are not saved)."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """The loss of a step, with further figures for the log. Deterministic in `step`."""

    def sample(self, folder: Path, step: int) -> None:
        """Write sample pictures of the present state into `folder`."""


def train(task: Task, config: LoopConfig, out: Path, *, identity: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Run (or resume) a stage; returns the trained tensors, averaged if `ema` is on.

    Args:
        task: what is trained.
        config: how.
        out: run folder; holds `log.jsonl`, `checkpoint.safetensors`, `samples/`.
        identity: facts that must not change between start and resume (sizes, data); a difference is refused.

    Raises:
        DataError: the folder holds another run, or the loss became NaN or infinite.
    """
    parameters = {name: p for name, p in task.trained.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
    out.mkdir(parents=True, exist_ok=True)
    facts = json.loads(json.dumps({**asdict(config), **(identity or {})}))
    start, meter = _resume(out / "checkpoint.safetensors", parameters, average, optimizer, facts)
    device = config.resolve_device()
    clock = time.monotonic()
    for step in _progress(start, config.steps):
        with (
            scoped_seed(config.seed, 4, step),
            torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
        ):
            loss, figures = task.loss(step)
        if not torch.isfinite(loss):
            raise DataError(f"The loss of step {step} is {loss.item()}; lower the learning rate and start from {out}.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        optimizer.step()
        _average(average, parameters, min(config.ema, (1 + step) / (10 + step)))
        meter.add({"loss": loss.item(), "grad_norm": float(norm), **figures})
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            seconds, clock = time.monotonic() - clock, time.monotonic()
            _append(out / "log.jsonl", {"step": done, "lr": config.lr_at(step), "seconds": seconds, **meter.flush()})
        if done % config.save_every == 0 or done == config.steps:
            _save(out / "checkpoint.safetensors", parameters, average, optimizer, (done, meter), facts)
        if config.sample_every and (done % config.sample_every == 0 or done == config.steps):
            with _weights(parameters, average), torch.no_grad():
                task.sample(out / "samples", done)
            clock = time.monotonic()
    return {name: tensor.detach().clone() for name, tensor in (average or parameters).items()}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, so that a difference between runs is named by the one setting it is in."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def _progress(start: int, steps: int) -> Iterator[int]:
    from tqdm import tqdm

    return iter(tqdm(range(start, steps), initial=start, total=steps, unit="step", smoothing=0.05, disable=None))


def _average(average: dict[str, Tensor], parameters: Mapping[str, Tensor], decay: float) -> None:
    if average:
        current = [parameters[name].detach() for name in average]
        torch._foreach_lerp_(list(average.values()), current, 1 - decay)


class _Meter:
    """Means of the figures between two lines of the log."""

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0) -> None:
        self.sums, self.count = dict(sums or {}), count

    def add(self, figures: Mapping[str, float]) -> None:
        self.count += 1
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def flush(self) -> dict[str, float]:
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


class _weights:  # noqa: N801 - used as a function
    """Within the block the parameters hold their moving average."""

    def __init__(self, parameters: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> None:
        self.parameters, self.average = parameters, average
        self.kept: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self.kept = {name: self.parameters[name].detach().clone() for name in self.average}
        self._put(self.average)

    def __exit__(self, *_: object) -> None:
        self._put(self.kept)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.parameters[name].data.copy_(tensor)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


def _save(
    path: Path,
    parameters: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: tuple[int, _Meter],
    facts: Mapping[str, Any],
) -> None:
    tensors = {f"weights.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{key}.{name}": value for key, value in state.items() if key in _MOMENTS}
    step, meter = progress
    state = {"step": step, "facts": facts, "meter": vars(meter)}
    metadata = {"format": "seesr-training", **{name: json.dumps(value) for name, value in state.items()}}
    with atomic_write(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_MAY_CHANGE = {"steps", "log_every", "save_every", "sample_every", "device"}


def _resume(
    path: Path,
    parameters: Mapping[str, Tensor],
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
) -> tuple[int, _Meter]:
    if not path.exists():
        (path.parent / "log.jsonl").unlink(missing_ok=True)
        return 0, _Meter()
    with safe_open(path, "pt") as file:
        metadata, saved = file.metadata(), set(file.keys())
        _check_same_run(path, json.loads(metadata["facts"]), facts)
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(f"weights.{name}"))
            if name in average:
                average[name].copy_(file.get_tensor(f"average.{name}"))
            moments = {key: file.get_tensor(f"{key}.{name}") for key in _MOMENTS if f"{key}.{name}" in saved}
            device = parameter.device
            optimizer.state[parameter] = {k: v if k == "step" else v.to(device) for k, v in moments.items()}
    step = int(metadata["step"])
    _cut_log(path.parent / "log.jsonl", step)
    log.info("resuming %s at step %d", path.parent, step)
    return step, _Meter(**json.loads(metadata.get("meter", "{}")))


def _check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = sorted((set(before) | set(now)) - _MAY_CHANGE)
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names if before.get(name) != now.get(name)
    ]
    if changed:
        raise DataError(
            f"{path.parent} holds a run with other settings ({'; '.join(changed)}); use another folder for this one."
        )


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps that will be run again."""
    if path.exists():
        lines = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), "utf-8")


def _step_of(line: str) -> float:
    """The step of a log line; a line cut off by the end of the process belongs to a step that no checkpoint has."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
