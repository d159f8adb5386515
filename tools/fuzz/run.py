"""Running mutants, and what became of them."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

import torch

from seesr_core.errors import SeeSRError
from seesr_core.runtime.memory import peak_memory, reset_peak

from .kinds import Kind

SECONDS = 10.0
"""Of processor time, after which a mutant hangs; the machine may have other work."""
MEMORY = 1 << 30
"""Bytes that a mutant may take beyond what the process had."""
WORKED, REFUSED, TRACEBACK, HANG, GREEDY = "worked", "refused", "traceback", "hang", "over 1 GB"
FAULTS = (TRACEBACK, HANG, GREEDY)
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one mutant."""

    kind: str
    """Of its input."""
    number: int
    """Which one."""
    what: str
    """One of the words above."""
    seconds: float
    """Processor time that it took."""
    more_bytes: int
    """Peak memory beyond what was there."""
    trace: str = ""
    """Of a traceback."""


class _HangError(BaseException):
    """The time is over; no handler of ordinary errors takes it for one."""


def run_mutant(kind: Kind, seed: int, number: int) -> Outcome:
    """Mutant `number` of a kind, which depends on the seed alone, in a folder of its own."""
    content = kind.make(Random(f"{seed} {kind.name} {number}"))
    folder = Path(tempfile.mkdtemp())
    path = folder / f"mutant{kind.suffix}"
    path.write_bytes(content)
    try:
        return _measured(kind, path, number)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measured(kind: Kind, path: Path, number: int) -> Outcome:
    reset_peak(_CPU)
    before, start = peak_memory(_CPU) or 0, time.process_time()
    what, trace = WORKED, ""
    try:
        with _limited(SECONDS):
            kind.use(path)
    except SeeSRError:
        what = REFUSED
    except _HangError:
        what = HANG
    except Exception:
        what, trace = TRACEBACK, traceback.format_exc()
    more = (peak_memory(_CPU) or 0) - before
    if what not in FAULTS and more > MEMORY:
        what = GREEDY
    return Outcome(
        kind=kind.name, number=number, what=what, seconds=time.process_time() - start, more_bytes=more, trace=trace
    )


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise _HangError

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
