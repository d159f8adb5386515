"""A grid of training runs, one after the other, and a table of what came out.

    python -m trainer.sweep sweep.toml

    command = "stage2"                      # stage1, stage2 or distill
    out = "runs/sweep"
    arguments = ["--recipe", "finetune-24gb", "--data", "photos.jsonl", "--validate", "pairs"]
    [grid]
    "loop.learning_rate" = [1e-4, 2e-5]
    min_snr = [0.0, 5.0]

Every combination has a folder of its own in `out`. The same command again goes on with the run that was interrupted,
leaves finished ones alone and tries failed ones again. `results.md` has a row for each.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from seesr_core.errors import DataError, SettingsError
from seesr_core.formats.schema import MalformedError, Within, read, read_json
from seesr_core.runtime.files import write_text

from .engine import command
from .engine.journal import last_line
from .engine.processes import is_main_process
from .engine.settings import read_toml
from .evaluate.report.tables import Column, markdown, show

log = logging.getLogger(__name__)

RESULTS, FINISHED = "results.md", "finished.json"
_STOPPED = (130, 143)
"""Exit statuses of a run that a person or the system ended."""
_KEPT = ("loss", "val_loss", "psnr_y", "ssim_y", "niqe")
"""Figures that come first in the table; whatever else a validation has follows."""

Value = str | bool | int | float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep's file."""

    command: Literal["stage1", "stage2", "distill"]
    """Command of every run."""
    out: str
    """Folder of the runs, relative to the file."""
    arguments: list[str]
    """Arguments that all runs share."""
    grid: Annotated[dict[str, list[Value]], Within(1, 32)]
    """Values of every setting that is varied, by its name."""

    def runs(self) -> dict[str, list[str]]:
        """The further arguments of every run, by its name."""
        values = itertools.product(*self.grid.values())
        pairs = [dict(zip(self.grid, combination, strict=True)) for combination in values]
        return {_name(pair): [word for name, value in pair.items() for word in _flag(name, value)] for pair in pairs}


@dataclass(kw_only=True)
class SweepCommand:
    """Train a grid of runs. The same command again goes on where it was interrupted."""

    file: tyro.conf.Positional[Path]
    """The sweep, a TOML file: command, out, arguments and a table [grid]."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a run failed."""
    failed: list[str] = []
    prog = "python -m trainer.sweep"
    code = command.run(lambda: failed.extend(sweep(tyro.cli(SweepCommand, args=argv, prog=prog).file)))
    return code or int(bool(failed))


def read_sweep(path: Path) -> Sweep:
    """The sweep in a file.

    Raises:
        SettingsError: it is no such file.
    """
    try:
        found: Sweep = read(Sweep, read_toml(path), "it", strict=True)
    except MalformedError as error:
        raise SettingsError(
            f"{path} should have `command`, `out`, `arguments` and a table [grid] with a list of values for each "
            f"setting: {error}."
        ) from error
    if empty := [name for name, values in found.grid.items() if not values]:
        raise SettingsError(f"{path}: the grid has no values for {', '.join(empty)}; give some, or leave it out.")
    return found


def sweep(path: Path, main_of: Callable[[str], Callable[[Sequence[str]], int]] | None = None) -> list[str]:
    """Train what is not yet finished; returns the names of the runs that failed.

    Args:
        path: the sweep's file.
        main_of: gives the entry point of a command; None takes the trainer's own.

    Raises:
        SettingsError: the file is no sweep. DataError: what is finished cannot be read.
        KeyboardInterrupt: a run was ended from outside.
    """
    plan = read_sweep(path)
    out, entry = path.parent / plan.out, (main_of or _main_of)(plan.command)
    finished, failed, runs = _finished(out), [], plan.runs()
    for number, (name, further) in enumerate(runs.items(), 1):
        if name in finished:
            continue
        log.info("run %d of %d: %s", number, len(runs), name)
        code = entry([*plan.arguments, *further, "--out", str(out / name)])
        if code in _STOPPED:
            raise KeyboardInterrupt
        if code:
            failed.append(name)
            continue
        finished[name] = _figures(out / name)
        if is_main_process():
            write_text(out / FINISHED, json.dumps(finished, indent=1))
    if is_main_process():
        _show_table(out, {name: finished.get(name, {}) for name in runs})
    if failed:
        log.error("%d of %d runs failed: %s; their messages are above.", len(failed), len(runs), ", ".join(failed))
    return failed


def _main_of(name: str) -> Callable[[Sequence[str]], int]:
    entry: Callable[[Sequence[str]], int] = importlib.import_module(f"{__package__}.{name}.command").main
    return entry


def _name(pair: Mapping[str, Value]) -> str:
    """A folder's name for the values of a run."""
    words = (f"{name.rpartition('.')[2]}={value}" for name, value in pair.items())
    return ",".join(words).replace("/", "_").replace(" ", "_")


def _flag(name: str, value: Value) -> list[str]:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        stem, dot, last = words.rpartition(".")
        return [f"--{words}" if value else f"--{stem}{dot}no-{last}"]
    return [f"--{words}", str(value)]


def _finished(out: Path) -> dict[str, dict[str, float]]:
    path = out / FINISHED
    try:
        found: dict[str, dict[str, float]] = read(dict[str, dict[str, float]], read_json(path)) if path.exists() else {}
        return found
    except (OSError, MalformedError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it to train every run anew.") from error


def _figures(run: Path) -> dict[str, float]:
    """The last loss of a run and its last validation."""
    log_line, validation = (last_line(run / name) for name in ("log.jsonl", "validation.jsonl"))
    return {**{name: log_line[name] for name in ("step", "loss") if name in log_line}, **validation}


def _show_table(out: Path, rows: Mapping[str, Mapping[str, float]]) -> None:
    others = sorted({name for figures in rows.values() for name in figures} - {*_KEPT, "step"})
    present = [name for name in (*_KEPT, *others) if any(name in figures for figures in rows.values())]
    columns = [
        Column(key="step", title="step", digits=0),
        *(Column(key=name, title=name, digits=4) for name in present),
    ]
    table = markdown("run", rows, columns)
    write_text(out / RESULTS, table)
    show(table)


if __name__ == "__main__":
    sys.exit(main())
