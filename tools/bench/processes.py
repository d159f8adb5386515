"""Every case in a process of its own, of this checkout or of another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.host import locate

from . import host
from .case import Case, Row
from .watch import Watch, tell

ROOT = Path(__file__).parents[2]


def command(*words: Any) -> list[str]:
    """How a part's process is started; its last line is its result as JSON."""
    return [sys.executable, "-m", "tools.bench", "--part", *map(str, words)]


def part(*words: Any) -> Any:
    """The result of a part."""
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(case: Case, patience: float, checkout: Path = ROOT) -> tuple[Row, str]:
    """What a case took within `patience` seconds, and why the rest is missing: empty if nothing is.

    Args:
        case: what to run.
        patience: seconds after which its process is stopped.
        checkout: the folder whose plugin, core and model are measured; the benchmark itself is always this one.
    """
    why = f"not in {patience:.0f} s"
    words = command("case", json.dumps(case.to_dict()), checkout)
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=patience, check=False)
        output = done.stdout
        why = ""
        if done.returncode:
            why = (done.stderr.decode(errors="replace").strip().splitlines() or [f"killed: {done.returncode}"])[-1][:80]
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
    told = [line for line in output.decode().splitlines() if line.startswith("{")]
    return (Row.from_dict(json.loads(told[-1])) if told else Row()), why


def run_part(name: str, *words: str) -> None:
    """What a part's process does."""
    if name == "case":
        _run_case(Case(**json.loads(words[0])), Path(words[1]))
        return
    parts: dict[str, Any] = {"start": host.start_time, "price": host.price}
    tell(json.dumps(parts[name](*map(int, words))))


def _run_case(case: Case, checkout: Path) -> None:
    if checkout.resolve() != ROOT:
        # Packages of this checkout that are needed are here already; what is measured comes from the other one.
        locate.PLUGIN = checkout
        sys.path.insert(0, str(checkout))
    if case.place == "core":
        from . import core

        core.measure(case, Watch())
    else:
        host.measure(case, Watch())
