"""Grids of runs: what is run, what is left alone, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from seesr_core.errors import DataError, SettingsError
from trainer.sweep import FINISHED, RESULTS, main, read_sweep, sweep

GRID = """
command = "stage2"
out = "runs"
arguments = ["--recipe", "debug"]
[grid]
"loop.learning_rate" = [0.1, 0.2]
skip_grey = [true, false]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(GRID, "utf-8")
    return path


def fake(seen: list[list[str]], codes: dict[str, int]) -> Callable[[str], Callable[[Sequence[str]], int]]:
    """A command that only writes a log; by the name of its folder it may fail."""

    def entry(argv: Sequence[str]) -> int:
        seen.append(list(argv))
        out = Path(argv[-1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.jsonl").write_text(f'{{"step": 3, "loss": {len(seen)}.5}}\n{{"step": 4, "lo', "utf-8")
        (out / "validation.jsonl").write_text('{"step": 2, "val_loss": 0.25, "lpips": 0.5}\n', "utf-8")
        return codes.get(out.name, 0)

    return lambda name: {"stage2": entry}[name]


def test_every_combination_is_run_in_a_folder_of_its_own(file: Path) -> None:
    seen: list[list[str]] = []
    assert sweep(file, fake(seen, {})) == []
    assert [argv[:-2] for argv in seen] == [
        ["--recipe", "debug", "--loop.learning-rate", rate, flag]
        for rate in ("0.1", "0.2")
        for flag in ("--skip-grey", "--no-skip-grey")
    ]
    assert [Path(argv[-1]).name for argv in seen][:2] == [
        "learning_rate=0.1,skip_grey=True",
        "learning_rate=0.1,skip_grey=False",
    ]
    table = (file.parent / "runs" / RESULTS).read_text("utf-8").splitlines()
    assert table[0] == "| run | step | loss | val_loss | lpips |"
    assert table[2] == "| learning_rate=0.1,skip_grey=True | 2 | 1.5000 | 0.2500 | 0.5000 |"
    assert len(table) == 6


def test_finished_runs_are_left_alone_and_failed_ones_tried_again(file: Path) -> None:
    seen: list[list[str]] = []
    bad = "learning_rate=0.1,skip_grey=False"
    assert sweep(file, fake(seen, {bad: 1})) == [bad]
    assert len(seen) == 4
    table = (file.parent / "runs" / RESULTS).read_text("utf-8")
    assert f"| {bad} | – | – | – | – |" in table
    again: list[list[str]] = []
    assert sweep(file, fake(again, {})) == []
    assert [Path(argv[-1]).name for argv in again] == [bad]
    assert len(json.loads((file.parent / "runs" / FINISHED).read_text("utf-8"))) == 4


def test_a_run_that_was_interrupted_ends_the_sweep(file: Path) -> None:
    seen: list[list[str]] = []
    with pytest.raises(KeyboardInterrupt):
        sweep(file, fake(seen, {"learning_rate=0.1,skip_grey=False": 130}))
    assert len(seen) == 2
    assert len(json.loads((file.parent / "runs" / FINISHED).read_text("utf-8"))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace('"stage2"', '"stage9"'), "command should be"),
        (GRID.replace("[true, false]", "[]"), "has no values for skip_grey"),
        (GRID.replace("[true, false]", "3"), "should have `command`"),
        (GRID.replace("out =", "outs ="), "should have `command`"),
    ],
)
def test_what_is_no_sweep_is_told(file: Path, text: str, message: str) -> None:
    file.write_text(text, "utf-8")
    with pytest.raises(SettingsError, match=message):
        read_sweep(file)


def test_damaged_results_are_not_overwritten(file: Path) -> None:
    (file.parent / "runs").mkdir()
    (file.parent / "runs" / FINISHED).write_text('{"a": [1]}', "utf-8")
    with pytest.raises(DataError, match=r"finished\.json cannot be read"):
        sweep(file, fake([], {}))


def test_the_command_trains_and_fails_with_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(GRID.replace('"--recipe", "debug"', '"--recipe", "none-such"'), "utf-8")
    assert main([str(file)]) == 1
    assert "| learning_rate=0.2,skip_grey=False | – |" in capsys.readouterr().out
