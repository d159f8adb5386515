"""The prepared script for a card: every section runs on the CPU with tiny networks, and it ends in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.gpu_check import __main__ as check
from tools.gpu_check.__main__ import SECTIONS, markdown, run
from tools.gpu_check.context import Context


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs(name: str) -> None:
    found = SECTIONS[name](Context(small=True))
    assert json.loads(json.dumps(found)) == found
    rows = check.flat(found)
    assert rows
    assert f"## {name}: done" in markdown({name: {"status": "done", "found": found}})
    if name == "parity":
        assert all(found[dtype]["within"] for dtype in ("fp32", "bf16"))
        assert found["picture"]["mean levels"] == 0
    if name == "tiles":
        assert found["without memory"].startswith("The memory is exhausted")
    if name == "stage2":
        assert len(found["cap of 24 GiB"]["losses"]) == 2
    if name == "fsdp2":
        assert len(found["losses"]) == 2


def sleeping(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Sections that only sleep, then give a figure; negative ones fail."""
    real = subprocess.run

    def start(words: list[str], **given: Any) -> Any:
        name = words[words.index("--section") + 1]
        long = seconds[name]
        told = f"import time; time.sleep({abs(long)}); assert {long} > 0, 'no card'; print('{{\"a\": 1}}')"
        return real([sys.executable, "-c", told], **given)

    monkeypatch.setattr(subprocess, "run", start)


@pytest.mark.slow
def test_it_ends_in_time_and_writes_after_every_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "_LEAST_S", 1.0)
    sleeping(monkeypatch, environment=0.1, parity=-0.1, nano=60, full=60)
    began = time.monotonic()
    found = run(["environment", "parity", "nano", "full"], 10 / 60, tmp_path)
    assert time.monotonic() - began < 10
    status = [section["status"] for section in found.values()]
    assert status[:2] == ["done", "failed"]
    assert status[2].startswith("stopped after")
    assert found["parity"]["said"][-1] == "AssertionError: no card"
    assert json.loads((tmp_path / "report.json").read_text()) == found
    text = (tmp_path / "report.md").read_text()
    assert "| a | 1 |" in text
    assert "AssertionError: no card" in text


def test_what_is_known_is_written_before_the_next_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def section(name: str, seconds: float, *, dry_run: bool) -> dict[str, Any]:
        known = tmp_path / "report.json"
        seen.append(list(json.loads(known.read_text())) if known.exists() else [])
        return {"status": "done", "found": {}}

    monkeypatch.setattr(check, "_section", section)
    run(["environment", "parity", "nano"], 1, tmp_path)
    assert seen == [[], ["environment"], ["environment", "parity"]]
