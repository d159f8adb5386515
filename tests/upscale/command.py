"""The command, and what a refusal must look like."""

from __future__ import annotations

from pathlib import Path

import pytest

from seesr_core.cli import main as cli


def run(model: Path, *arguments: object) -> int:
    given = [str(argument) for argument in arguments]
    return cli.main(["upscale", *given, "--model", str(model), "--device", "cpu", "--dtype", "fp32"])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refusal(model: Path, capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """The one line on stderr of a command that must fail."""
    assert run(model, *arguments) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err
