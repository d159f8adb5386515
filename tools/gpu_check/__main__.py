"""All that is to be learnt of a card, in one run that ends in time: for the first GPU that is at hand for a while.

    python -m tools.gpu_check --minutes 15 --out DIR [--dry-run] [--sections NAME …]

Environment and the card's own rates; the same numbers as on the CPU; attention kernels; time by phase, eager and
compiled; DDPM-50 at 512² against the arithmetic that it needs; peak memory against the planner's forecast; tiles at
once, and memory that runs out; training steps under a cap of memory; FSDP2 on one card. Every section is a process of
its own and is stopped when its time is over; `report.json` and `report.md` are written after each. Networks of the
published sizes are made by the rule: nothing is downloaded. `--dry-run` runs every section with tiny networks on the
CPU, to see that they would.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import sections, training
from .context import Context

ROOT = Path(__file__).parents[2]
SECTIONS: Mapping[str, Any] = {
    "environment": sections.environment,
    "parity": sections.parity,
    "attention": sections.attention,
    "nano": sections.nano,
    "full": sections.full,
    "ddpm50": sections.ddpm50,
    "memory": sections.memory,
    "compiled": sections.compiled,
    "tiles": sections.tiles,
    "stage1": training.stage1,
    "stage2": training.stage2,
    "fsdp2": training.fsdp2,
}
"""In the order in which they run: the most telling first. A new one is a line here."""
_LEAST_S = 5.0
"""Seconds below which no further section is begun."""
_GRACE_S = 2.0
"""Seconds kept for writing the report."""


def main() -> int:
    """Command line; returns the exit status: 0 if every section that was run ended well."""
    options = _parser().parse_args()
    if options.section:
        found = SECTIONS[options.section](Context(small=options.dry_run))
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return 0
    found = run(options.sections, options.minutes, options.out, dry_run=options.dry_run)
    return int(any(section["status"] != "done" for section in found.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description="All that is to be learnt of a card."
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="after which it has ended, whatever happens")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for the report")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="only these")
    parser.add_argument("--dry-run", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser


def run(names: list[str], minutes: float, out: Path, *, dry_run: bool = False) -> dict[str, Any]:
    """Run sections until the time is over, and write what is known after each; returns it."""
    end = time.monotonic() + 60 * minutes - _GRACE_S
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for number, name in enumerate(names):
        left = end - time.monotonic()
        # A section may take three times its even share of what is left, so that none takes everything.
        budget = min(left, 3 * left / (len(names) - number))
        report[name] = _section(name, budget, dry_run=dry_run) if left > _LEAST_S else {"status": "no time left"}
        write(out, report)
    return report


def _section(name: str, seconds: float, *, dry_run: bool) -> dict[str, Any]:
    words = [sys.executable, "-m", "tools.gpu_check", "--section", name, *(["--dry-run"] if dry_run else [])]
    began = time.monotonic()
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as stopped:
        last = (stopped.stderr or b"").decode(errors="replace").strip().splitlines()[-1:]
        return {"status": f"stopped after {seconds:.0f} s", "found": {}, "said": last}
    taken = time.monotonic() - began
    if done.returncode:
        return {"status": "failed", "seconds": taken, "found": {}, "said": done.stderr.strip().splitlines()[-5:]}
    return {"status": "done", "seconds": taken, "found": json.loads(done.stdout.strip().splitlines()[-1])}


def write(out: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON and as Markdown, each whole or not at all."""
    from seesr_core.runtime.files import write_text

    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "report.md", markdown(report))


def markdown(report: Mapping[str, Any]) -> str:
    """A heading a section, below it a table of what it found."""
    parts = []
    for name, section in report.items():
        parts.append(f"## {name}: {section['status']}\n")
        if section.get("said"):
            parts.append("\n".join(["```", *section["said"], "```", ""]))
        rows = [f"| {key} | {_text(value)} |" for key, value in flat(section.get("found", {})).items()]
        parts += ["| what | found |\n|---|---|\n" + "\n".join(rows) + "\n"] if rows else []
    return "\n".join(parts)


def flat(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures under one name each: "fp16, sample, seconds"."""
    rows: dict[str, Any] = {}
    for name, value in found.items():
        full = f"{prefix}, {name}" if prefix else name
        rows |= flat(value, full) if isinstance(value, dict) else {full: value}
    return rows


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
