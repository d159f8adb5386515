"""What a run tells while it works: figures on disk, in TensorBoard and at Weights & Biases, progress, `run.json`."""

from __future__ import annotations

import json
import logging
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from seesr_core import __version__
from seesr_core.errors import ResourceError
from seesr_core.formats.schema import parse_json, read, read_json
from seesr_core.runtime.files import read_text, write_text

log = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds between lines about the progress, where no bar can be shown."""
_PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "peft", "safetensors", "numpy")


class Total(NamedTuple):
    """A figure that is a sum over some of a part's images; its mean is taken over those of all parts and processes."""

    total: float | Tensor
    """Sum over the images."""
    images: int | Tensor
    """How many they are."""


Figures: TypeAlias = Mapping[str, "float | Tensor | Total"]
"""Figures of a part of a batch, by name. Tensors of one value are read when the part is through: it waits for the
device."""


class RunningMeans:
    """Means of figures between two lines of the log; every figure is averaged over the times that it was given, a
    `Total` over what it counts."""

    def __init__(self, sums: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None) -> None:
        self.sums, self.counts = dict(sums or {}), dict(counts or {})

    def add(self, figures: Figures) -> None:
        """Take in the figures of a step, or of a part of one."""
        for name, value in figures.items():
            self._add(name, *(value if isinstance(value, Total) else (value, 1)))

    def _add(self, name: str, value: float | Tensor, count: int | Tensor) -> None:
        if count := int(count):
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.counts[name] = self.counts.get(name, 0) + count

    def state(self) -> dict[str, dict[str, Any]]:
        """What the constructor takes."""
        return {"sums": self.sums, "counts": self.counts}

    @classmethod
    def merged(cls, states: Iterable[Mapping[str, Mapping[str, Any]]]) -> RunningMeans:
        """Those of several processes as one."""
        total = cls()
        for state in states:
            for name, value in state["sums"].items():
                total._add(name, value, state["counts"][name])
        return total

    def means(self) -> dict[str, float]:
        """Means of the figures so far, by name."""
        return {name: value / self.counts[name] for name, value in self.sums.items()}

    def clear(self) -> None:
        """Forget all figures and begin anew."""
        self.sums, self.counts = {}, {}


class Journal:
    """Writes the figures of a run to every place that wants them; only the main process has one that writes.

    Args:
        out: run folder.
        writes: whether this process writes.
        wandb: project of Weights & Biases, or nothing.
        facts: the settings, shown there.
    """

    def __init__(self, out: Path, *, writes: bool, wandb: str = "", facts: Mapping[str, Any] | None = None) -> None:
        self.paths = {"log": out / "log.jsonl", "validation": out / "validation.jsonl"}
        self.writes = writes
        self.board: Any = None
        self.board_folder: Path | None = out / "tensorboard" if writes else None
        self.wandb: Any = _wandb(wandb, out, facts or {}) if writes and wandb else None

    def begin(self, step: int) -> None:
        """Drop the lines of steps that will be run again, in TensorBoard's files, too."""
        if self.board_folder is not None:
            self.board, self.board_folder = _tensorboard(self.board_folder, step + 1), None
        for path in self.paths.values() if self.writes else ():
            if step == 0:
                path.unlink(missing_ok=True)
            elif path.exists():
                lines = [line for line in read_text(path, errors="replace").splitlines() if _step_of(line) <= step]
                write_text(path, "".join(line + "\n" for line in lines))

    def write(self, line: Mapping[str, Any], *, kind: str = "log") -> None:
        """One line of figures; it has at least `step`. `kind` is "log" or "validation".

        Raises:
            ResourceError: the disk is full.
        """
        if not self.writes:
            return
        try:
            with self.paths[kind].open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ResourceError(
                f"Could not write {self.paths[kind]}: {error.strerror}. Free some room and give the same command again."
            ) from error
        figures = {name: value for name, value in line.items() if name != "step"}
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, line["step"])
        if self.wandb is not None:
            self.wandb.log(figures, step=line["step"])

    def close(self) -> None:
        """Flush what is still on its way."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("No TensorBoard files: `pip install tensorboard` if you want them; log.jsonl has the same figures.")
        return None
    return SummaryWriter(str(folder), purge_step=first_step)


def _wandb(project: str, out: Path, facts: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.init(project=project, name=out.name, dir=str(out), config=dict(facts), resume="allow", id=out.name)


def _step_of(line: str) -> float:
    """The step of a log line; one that is cut off or damaged belongs to a step that no checkpoint has."""
    try:
        return read(dict[str, Any], parse_json(line))["step"] + 0.0
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """Images done, images per second, time left, and averages of the loss: as a bar, or a line a minute without a
    terminal."""

    def __init__(self, done: int, total: int, *, shown: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            initial=done, total=total, unit="img", unit_scale=True, smoothing=0.05, disable=None if shown else True
        )
        self.loss: float | None = None
        self.done, self.total = done, total
        self.told = shown and self.bar.disable
        self.since, self.before = time.monotonic(), done

    def add(self, images: int, loss: float) -> None:
        """Count the images of a step; a loss that is no number leaves the average as it is."""
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        if self.loss is not None:
            self.bar.set_postfix_str(f"loss {self.loss:.4f}", refresh=False)
        self.bar.update(images)
        self.done += images
        if self.told and time.monotonic() - self.since >= EVERY:
            self._tell()

    def _tell(self) -> None:
        """The same as a line of the log, where there is no terminal for a bar."""
        now = time.monotonic()
        rate = (self.done - self.before) / (now - self.since)
        left = timedelta(seconds=round((self.total - self.done) / rate))
        loss = "none yet" if self.loss is None else f"{self.loss:.4f}"
        log.info("%d of %d images, %.2f images/s, loss %s, %s left", self.done, self.total, rate, loss, left)
        self.since, self.before = now, self.done

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def last_line(path: Path) -> dict[str, float]:
    """The figures in the last whole line of a log; empty without one."""
    for line in reversed(read_text(path, errors="replace").splitlines()) if path.exists() else ():
        try:
            found: dict[str, float] = read(dict[str, float], parse_json(line))
            return found
        except ValueError:
            continue
    return {}


def write_run(out: Path, facts: Mapping[str, Any], *, processes: int, device: torch.device) -> None:
    """`run.json`: the resolved recipe, the code's version and the environment, with one entry for every start."""
    path = out / "run.json"
    starts = _starts(path)
    starts.append(
        {
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": sys.argv,
            "code": {"version": __version__, "commit": _commit()},
            "processes": processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
        }
    )
    write_text(path, json.dumps({"recipe": dict(facts), "starts": starts}, indent=1))


def _starts(path: Path) -> list[dict[str, Any]]:
    try:
        starts: list[dict[str, Any]] = read(list[dict[str, Any]], read(dict[str, Any], read_json(path))["starts"])
        return starts
    except (OSError, ValueError, KeyError):
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree that runs, if it is a checkout and git is there."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
