"""The commands of `trainer.evaluate`, and the other names of some."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest

from trainer.evaluate.commands import COMMANDS, PROG, main

from .golden import ROOT


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert PROG in shown
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("trainer.evaluate", "--html-pictures"),
        ("trainer.evaluate.ablation", "--pairs"),
        ("trainer.evaluate.grounding", "--boxes"),
        ("trainer.evaluate.dape", "--train-photos"),
        ("trainer.evaluate.degrade", "--photos"),
        ("trainer.make_testset", "--expect"),
    ],
)
def test_every_name_leads_to_its_command(
    module: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--sr", "x", "--help"] if module == "trainer.evaluate" else ["--help"]
    monkeypatch.setattr(sys, "argv", [module, *words])
    monkeypatch.delitem(sys.modules, module, raising=False)  # else runpy warns that it is there already
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    shown = capsys.readouterr()
    assert (stop.value.code, shown.err) == (0, "")
    assert flag in shown.out


def test_a_reader_that_leaves_early_ends_it_silently() -> None:
    command = f"{sys.executable} -m trainer.evaluate dape --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""
