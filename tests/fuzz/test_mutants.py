"""Mutants of every kind of input end in a result or in one sentence, soon and within bounds.

The default tier runs a few of each; `slow` runs for SEESR_FUZZ_MINUTES (2), `python -m tools.fuzz` as long as asked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from seesr_core.errors import DataError
from tools.fuzz.kinds import Kind, all_kinds
from tools.fuzz.mutate import damaged, damaged_json
from tools.fuzz.run import GREEDY, HANG, REFUSED, TRACEBACK, WORKED, run_mutant

ROOT = Path(__file__).parents[2]
SEED = 7
DEAR = {"metadata of a base": 2, "metadata of a control": 4, "metadata of a tagger": 4, "safetensors header": 20}
"""Kinds whose mutants take long, and how many of them are run."""
KINDS = all_kinds()


@pytest.mark.parametrize("name", KINDS)
def test_a_few_mutants(name: str) -> None:
    faults = []
    for number in range(DEAR.get(name, 40)):
        outcome = run_mutant(KINDS[name], SEED, number)
        if outcome.what not in (WORKED, REFUSED):
            faults.append(f"{outcome.what} of mutant {number}\n{outcome.trace}")
    assert faults == []


def test_mutants_are_the_same_for_the_same_seed_and_differ_otherwise() -> None:
    kind = KINDS["COCO boxes"]
    made = [[kind.make(Random(f"{seed} x {n}")) for n in range(20)] for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert len(set(made[0])) > 15
    content = bytes(range(256))
    assert sum(damaged(content, [content], Random(n)) != content for n in range(100)) > 95
    assert sum(damaged_json({"a": [1, 2]}, Random(n)) != {"a": [1, 2]} for n in range(100)) > 95


def _fail(path: Path) -> None:
    raise KeyError("x")


def _refuse(path: Path) -> None:
    raise DataError("no")


def _loop(path: Path) -> None:
    while True:
        pass


def _fill(path: Path) -> None:
    bytearray(b"x") * (1 << 28)


@pytest.mark.parametrize(
    ("use", "what"), [(_fail, TRACEBACK), (_refuse, REFUSED), (_loop, HANG), (_fill, GREEDY), (len, TRACEBACK)]
)
def test_the_runner_tells_what_became_of_a_mutant(monkeypatch: pytest.MonkeyPatch, use: object, what: str) -> None:
    monkeypatch.setattr("tools.fuzz.run.MEMORY", 1 << 27)
    monkeypatch.setattr("tools.fuzz.run.SECONDS", 0.2 if use is _loop else 10.0)
    outcome = run_mutant(Kind("x", ".x", lambda draw: b"", use), 0, 0)  # type: ignore[arg-type]
    assert outcome.what == what
    assert bool(outcome.trace) == (what == TRACEBACK)


@pytest.mark.slow
def test_many_mutants_of_a_seed_that_nobody_chose() -> None:
    minutes, seed = os.environ.get("SEESR_FUZZ_MINUTES", "2"), str(int.from_bytes(os.urandom(4), "big"))
    command = [sys.executable, "-m", "tools.fuzz", "--minutes", minutes, "--seed", seed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"seed {seed}: " in done.stdout
