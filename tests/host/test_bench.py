"""What the benchmark's figures promise without a clock: they are counted in fresh processes, as its command does."""

from __future__ import annotations

import json
import sys

import pytest

from tools import bench


def test_import_is_quick_and_opens_no_connection() -> None:
    """Sockets are blocked in that process; processor time, since other work on the machine is not the plugin's."""
    assert bench._part("start")["busy"] <= 0.5


def test_both_prompts_share_a_call() -> None:
    assert bench._part("calls", 3) == {"steps": 3, "calls": 3, "batch": [2]}


def test_a_row_that_does_not_end_keeps_what_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"device": "cpu", "held_mib": 800.0}
    told = f"import sys, time; print({json.dumps(known)!r}, flush=True); time.sleep(60)"
    monkeypatch.setattr(bench, "_command", lambda *_: [sys.executable, "-c", told])
    bench._sizes([512], ["untiled"], 2, 512, patience=3)
    assert "| 512 | untiled | cpu | 800 | not in 3 s | | not in 3 s | |" in capsys.readouterr().out


def test_a_row_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = "raise MemoryError('no more')"
    monkeypatch.setattr(bench, "_command", lambda *_: [sys.executable, "-c", told])
    bench._sizes([512], ["tiled"], 2, 512, patience=30)
    assert "MemoryError: no more" in capsys.readouterr().out
