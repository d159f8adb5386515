"""The benchmark's figures as Markdown and JSON, beside those of an earlier report or of another checkout."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .case import Case, Row

_HEAD = (
    "| place | net | dtype | kind | side px | sampling CPU-s | peak MiB | all CPU-s (wall) | peak MiB | calls "
    "(latents) | shares of the time |"
)
_RATIO = " CPU time, memory × {} |"


@dataclass(kw_only=True, slots=True)
class Entry:
    """A case with what it took, and what it took elsewhere."""

    case: Case
    row: Row = field(default_factory=Row)
    why: str = ""
    """Why something is missing; empty if nothing is."""
    others: list[Row] = field(default_factory=list)
    """The same case of what it is compared with: as often as it ran there."""
    again: list[Row] = field(default_factory=list)
    """Further runs of the case itself."""

    def pairs(self) -> list[tuple[Row, Row]]:
        """Runs that ended, each with the other one's that was next to it."""
        found = zip([self.row, *self.again], self.others, strict=False)
        return [(mine, theirs) for mine, theirs in found if mine.done and theirs.done]

    def ratio(self) -> tuple[float, float] | None:
        """Processor time and peak memory over those of the other one: medians over the pairs of runs."""
        pairs = [(mine.whole, theirs.whole) for mine, theirs in self.pairs()]
        if not pairs:
            return None
        busy = statistics.median(mine.busy / theirs.busy for mine, theirs in pairs)
        return busy, statistics.median(mine.peak_mib / theirs.peak_mib for mine, theirs in pairs)

    def phase_ratios(self) -> dict[str, float]:
        """The same of the processor time of every phase that both have, by name."""
        pairs = self.pairs()
        names = [name for name in self.row.phases if pairs and all(name in theirs.phases for _, theirs in pairs)]
        return {
            name: statistics.median(mine.phases[name].busy / theirs.phases[name].busy for mine, theirs in pairs)
            for name in names
            if all(theirs.phases[name].busy for _, theirs in pairs)
        }

    def missing(self, pairs: int = 0) -> str:
        """What did not end of the case and of its `pairs` with another one, in words; empty if nothing is missing."""
        done = sum(1 for _ in self.pairs())
        return ", ".join(filter(None, [self.why, f"{done} of {pairs} pairs" if done < pairs else ""]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "case": self.case.to_dict(),
            "row": asdict(self.row),
            "why": self.why,
            "shares": self.row.shares(),
            **self._compared(),
        }

    def _compared(self) -> dict[str, Any]:
        """Every run beside the other one's next to it, ended or not, and the ratio of those that ended."""
        ratio, runs = self.ratio(), zip_longest([self.row, *self.again], self.others)
        found: dict[str, Any] = {}
        if ratio:
            found["ratio"] = {"busy": ratio[0], "peak": ratio[1], "phases": self.phase_ratios()}
        if self.others:
            found["pairs"] = [[row and asdict(row) for row in pair] for pair in runs]
        return found


@dataclass(kw_only=True, slots=True)
class Report:
    """All that a command measures, as far as it came."""

    wanted: Sequence[Case]
    """Every row that was asked for."""
    pairs: int = 0
    """How often each runs beside another one."""
    entries: list[Entry] = field(default_factory=list)
    """Rows that were begun, in that order."""
    more: dict[str, Any] = field(default_factory=dict)
    """Figures that are no rows, by name."""
    file: Path | None = None
    """Where it is kept."""

    def missing(self) -> list[str]:
        """What was asked for and has not ended, a line for each row."""
        begun = {entry.case.name: entry.missing(self.pairs) for entry in self.entries}
        found = {case.name: begun.get(case.name, "not begun") for case in self.wanted}
        return [f"{name}: {what}" for name, what in found.items() if what]

    def save(self) -> None:
        """Write what is known, as JSON."""
        from seesr_core import __version__
        from seesr_core.runtime.files import write_text

        found: dict[str, Any] = {"version": __version__, "processor": processor()}
        found["rows"] = [entry.to_dict() for entry in self.entries]
        found |= {"missing": self.missing(), **self.more}
        if self.file:
            write_text(self.file, json.dumps(found, indent=1) + "\n")


def line(entry: Entry) -> str:
    """The entry as a line of the table."""
    case, row = entry.case, entry.row
    sampling, whole = row.sampling, row.whole
    cells = [case.place, case.net, case.dtype, case.kind, str(case.side)]
    cells += [f"{sampling.busy:.1f}", f"{sampling.peak_mib:.0f}"] if sampling.seconds else [entry.why, ""]
    known = row.done and not case.alone
    cells += [f"{whole.busy:.0f} ({whole.seconds:.0f})", f"{whole.peak_mib:.0f}"] if known else [entry.why or "–", ""]
    cells += [", ".join(f"{name} {count} ({row.latents[name]})" for name, count in row.calls.items())]
    cells += [", ".join(f"{name} {share:.0%}" for name, share in row.shares().items() if share >= 0.005)]
    ratio = entry.ratio()
    cells += [f"{ratio[0]:.2f}, {ratio[1]:.2f}{_phases(entry)}"] if ratio else []
    return f"| {' | '.join(cells)} |"


def _phases(entry: Entry) -> str:
    """The ratios of the phases that take a twentieth of the time or more."""
    shares = entry.row.shares()
    found = [f"{name} {ratio:.2f}" for name, ratio in entry.phase_ratios().items() if shares[name] >= 0.05]
    return f" ({', '.join(found)})" if len(found) > 1 else ""


def head(case: Case, other: str = "") -> str:
    """What the table begins with; `other` names what it is compared with."""
    columns = _HEAD + (_RATIO.format(other) if other else "")
    return (
        f"{case.steps} steps, CFG {case.cfg:g}, tiles of {case.tile} px one at a time, {processor()}\n\n{columns}\n"
        f"|{'---|' * (columns.count('|') - 1)}"
    )


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")), "")


def beside(path: Path) -> dict[str, Row]:
    """The rows of an earlier report, by the name of their case.

    Raises:
        SystemExit: it is no report of this benchmark.
    """
    try:
        report: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        return {Case(**entry["case"]).name: Row.from_dict(entry["row"]) for entry in report["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} should be a report of this benchmark (--json) but is not ({error}).") from error


def compare(entries: Sequence[Entry]) -> list[str]:
    """How far the largest picture's sampling lies above that of one tile, for every kind."""
    lines = []
    for kind in dict.fromkeys(entry.case.kind for entry in entries):
        rows = [e for e in entries if e.case.kind == kind and e.row.sampling.seconds and e.case.place == "host"]
        one = next((e.row.sampling for e in rows if e.case.side == e.case.tile), None)
        most = max(rows, key=lambda e: e.case.side, default=None)
        if one is None or most is None or most.row.sampling is one:
            continue
        sampling = most.row.sampling
        held = sampling.held_mib - one.held_mib
        lines.append(
            f"{kind}, peak of sampling the largest over that of one tile: {sampling.peak_mib / one.peak_mib:.2f}; "
            f"less the {held:.0f} MiB that the larger pictures took before: "
            f"{(sampling.peak_mib - held) / one.peak_mib:.2f}; sampling itself adds "
            f"{sampling.peak_mib - sampling.held_mib:.0f} MiB instead of {one.peak_mib - one.held_mib:.0f}"
        )
    return lines
