"""Commands that are interrupted, terminated and killed at random moments: the next run ends with the same results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .kills import SCENARIOS

ROOT = Path(__file__).parents[2]


def killed(name: str, folder: Path, kills: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz.kills", name, str(folder), str(kills), "11"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["last"], told["same"], told["left"]) == (0, True, []), told
    # A command that was done before its signal came returns 0.
    expected = [{0, 130}, {0, 143}, {0, 137}]
    assert all(code in expected[number % 3] for number, code in enumerate(told["codes"])), told


@pytest.mark.slow
def test_a_training_that_is_killed_three_times(tmp_path: Path) -> None:
    killed("train", tmp_path, 3)


@pytest.mark.slow
def test_segsr_goes_on_after_kill_9(tmp_path: Path) -> None:
    killed("segsr", tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_commands_that_are_killed_many_times(tmp_path: Path, name: str) -> None:
    killed(name, tmp_path, 12)
