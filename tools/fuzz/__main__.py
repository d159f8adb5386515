"""`python -m tools.fuzz --minutes N --seed S`: mutants of every kind in turn, a table of what became of them.

`--mutants N` makes N of each kind instead, however long that takes. Exit status 1 if any ended in a traceback, a hang,
too much memory or a crash; each such mutant is named, and `--kind NAME --number N` runs it alone.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import pickle
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import torch

from .kinds import Kind, all_kinds
from .run import FAULTS, HANG, REFUSED, SECONDS, WORKED, Outcome, run_mutant

CRASH = "crash"
_CHUNK = 100
_PATIENCE = 12 * SECONDS
"""Seconds without an answer, after which a mutant hangs where no signal reaches it."""
_COLUMNS = (WORKED, REFUSED, *FAULTS, CRASH)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=(__doc__ or "").split(":", 1)[1])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--mutants", type=int, help="how many of each kind, in the place of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="of all mutants (0)")
    parser.add_argument("--kind", help="only this kind")
    parser.add_argument("--number", type=int, help="only this mutant of --kind")
    options = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    kinds = all_kinds()
    if options.kind is not None:
        kinds = {options.kind: kinds[options.kind]}
    if options.number is not None:
        _say(str(run_mutant(kinds[options.kind], options.seed, options.number)).replace("\\n", "\n"))
        return 0
    if options.mutants is not None:
        return _run(kinds, options.seed, math.inf, options.mutants)
    return _run(kinds, options.seed, options.minutes, sys.maxsize)


def _run(kinds: dict[str, Kind], seed: int, minutes: float, most: int) -> int:
    counts: dict[str, Counter[str]] = {name: Counter() for name in kinds}
    largest, longest, first, until = 0, 0.0, 0, time.monotonic() + 60 * minutes
    while time.monotonic() < until and first < most:
        for name, kind in kinds.items():
            for outcome in _chunk(kind, seed, first, min(first + _CHUNK, most)):
                counts[name][outcome.what] += 1
                largest, longest = max(largest, outcome.more_bytes), max(longest, outcome.seconds)
                if outcome.what in (*FAULTS, CRASH):
                    _say(f"{outcome.what}: --seed {seed} --kind {name!r} --number {outcome.number}\n{outcome.trace}")
            if time.monotonic() > until:
                break
        first += _CHUNK
    _say(_table(counts))
    total, faults = Counter[str](), 0
    for row in counts.values():
        total.update(row)
    faults = sum(total[what] for what in (*FAULTS, CRASH))
    _say(
        f"seed {seed}: {total.total():,} mutants of {len(kinds)} kinds, {faults} faults; the longest took "
        f"{longest:.1f} s, the largest {largest / 1e6:.0f} MB more"
    )
    return 1 if faults else 0


def _table(counts: dict[str, Counter[str]]) -> str:
    lines = [f"| kind | mutants | {' | '.join(_COLUMNS)} |", f"| --- {'| ---: ' * (len(_COLUMNS) + 1)}|"]
    rows = {**counts, "all": sum(counts.values(), Counter())}
    lines += [f"| {n} | {c.total()} | {' | '.join(str(c[what]) for what in _COLUMNS)} |" for n, c in rows.items()]
    return "\n".join(lines)


def _chunk(kind: Kind, seed: int, first: int, last: int) -> Iterator[Outcome]:
    """Mutants from `first` to before `last`, in a process of their own, so that one that crashes is told."""
    number = first
    while number < last:
        done = 0
        for outcome in _in_child(kind, seed, number, last):
            done += 1
            yield outcome
        number += max(done, 1)


def _in_child(kind: Kind, seed: int, first: int, last: int) -> Iterator[Outcome]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(kind, seed, range(first, last), os.fdopen(writing, "wb"))
    os.close(writing)
    number = first
    with os.fdopen(reading, "rb") as answers:
        while number < last:
            if not select.select([answers], [], [], _PATIENCE)[0]:
                os.kill(child, signal.SIGKILL)
                yield Outcome(kind=kind.name, number=number, what=HANG, seconds=_PATIENCE, more_bytes=0)
                break
            found = _answer(answers)
            yield found or Outcome(kind=kind.name, number=number, what=CRASH, seconds=0, more_bytes=0)
            if found is None:
                break
            number += 1
    os.waitpid(child, 0)


def _work(kind: Kind, seed: int, numbers: range, answers: BinaryIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders written in C say there what they think
    for number in numbers:
        content = pickle.dumps(run_mutant(kind, seed, number))
        answers.write(len(content).to_bytes(4, "big") + content)
        answers.flush()
    os._exit(0)


def _answer(answers: BinaryIO) -> Outcome | None:
    length = int.from_bytes(answers.read(4), "big")
    return pickle.loads(answers.read(length)) if length else None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
