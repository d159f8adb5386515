"""Ctrl-C, full disks and faults of ours: nothing half is left and nothing finished is lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seesr_core.cli import upscale
from seesr_core.pictures.reading import read_photo

from ..golden import ROOT
from .command import refusal, run


def test_a_fault_of_ours_does_not_cost_the_other_photos(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def read(path: Path, **options: Any) -> Any:
        if path.name == "a.jpg":
            raise ZeroDivisionError("division by zero")
        return read_photo(path, **options)

    monkeypatch.setattr(upscale, "read_photo", read)
    assert run(model, folder, tmp_path / "results") == 1
    assert sorted(os.listdir(tmp_path / "results")) == ["a.png.png", "logo.png"]
    assert "a.jpg: unexpected ZeroDivisionError: division by zero" in capfd.readouterr().err


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_the_middle_leaves_no_half_file(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("seesr_core.method.sampling.ddpm_step", interrupt)
    target = tmp_path / "results" / "out.png"
    assert run(model, source, target) == 130
    assert capfd.readouterr().err == "error: Interrupted; no half file was left.\n"
    assert list(target.parent.iterdir()) == []


def test_ctrl_c_while_writing_leaves_no_half_file(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seesr_core.runtime.files._link", interrupt)
    assert run(model, source, tmp_path / "results" / "out.png") == 130
    assert list((tmp_path / "results").iterdir()) == []


def test_ctrl_c_in_a_folder_keeps_what_is_done_and_reports_it(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **options: Any) -> Any:
        return read_photo(path, **options) if path.name == "a.jpg" else interrupt()

    monkeypatch.setattr(upscale, "read_photo", read)
    report = tmp_path / "report.json"
    assert run(model, folder, tmp_path / "results", "--json", report) == 130
    assert os.listdir(tmp_path / "results") == ["a.jpg.png"]
    assert [entry["status"] for entry in json.loads(report.read_text())["photos"]] == ["done"]


def test_a_full_disk_loses_nothing(
    model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("seesr_core.runtime.files.os.replace", full)
    target = tmp_path / "results" / "out.png"
    assert "out.png: No space left on device" in refusal(model, capfd, source, target)
    assert list(target.parent.iterdir()) == []


def test_ctrl_c_from_outside_ends_with_130(model: Path, source: Path, tmp_path: Path) -> None:
    """A real signal to a real process, sent as soon as the sampling begins."""
    program = (
        "import os, signal, sys\n"
        "import seesr_core.method.sampling as sampling\n"
        "from seesr_core.cli.main import main\n"
        "step = sampling.ddpm_step\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have come with it ignored\n"
        "def signalled(*a, **k):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(*a, **k)\n"
        "sampling.ddpm_step = signalled\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    target = tmp_path / "results" / "out.png"
    command = [sys.executable, "-c", program, "upscale", str(source), str(target), "--model", str(model)]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: Interrupted; no half file was left.\n")
    assert list(target.parent.iterdir()) == []
