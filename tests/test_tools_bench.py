"""The benchmark outside the host: rows, ratios, what does not end, and straight lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from seesr_core.runtime.signals import TERMINATED
from tools.bench import __main__ as command
from tools.bench import processes, report
from tools.bench.case import PHASES, Case, Cost, Row, cases
from tools.bench.growth import Line, draw, lines
from tools.bench.watch import Watch

SMALL = Case(place="core", net="small", side=128, tile=64, steps=2)


def row(busy: float = 1.0, peak: float = 100.0) -> Row:
    return Row(
        phases={"sample": Cost(seconds=busy, busy=busy, peak_mib=peak)},
        calls={"unet": 2},
        latents={"unet": 4},
        done=True,
    )


def test_a_row_of_the_core() -> None:
    from tools.bench import core

    found = core.measure(SMALL, Watch(aloud=False))
    assert found.done
    assert list(found.phases) == list(PHASES)
    assert all(cost.seconds > 0 and cost.peak_mib > 0 for cost in found.phases.values())
    assert found.calls == {"unet": 2 * 9, "controlnet": 2 * 9}
    assert found.latents == {"unet": 2 * 2 * 9, "controlnet": 2 * 2 * 9}
    assert Row.from_dict(json.loads(json.dumps(report.Entry(case=SMALL, row=found).to_dict()["row"]))) == found


def test_sampling_alone_and_fewer_pixels_in_balanced_tiles() -> None:
    from tools.bench import core

    published, balanced = (
        core.measure(Case(place="core", net="small", side=136, tile=96, kind=kind, alone=True), Watch(aloud=False))
        for kind in ("tiled", "balanced")
    )
    assert published.calls == balanced.calls
    assert set(published.phases) == {"sample"}


def test_a_row_that_does_not_end_keeps_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"device": "cpu", "phases": {"encode": {"seconds": 2.0, "busy": 1.5, "held_mib": 10.0, "peak_mib": 800.0}}}
    told = f"import sys, time; print({json.dumps(known)!r}, flush=True); time.sleep(60)"
    monkeypatch.setattr(processes, "command", lambda *_: [sys.executable, "-c", told])
    found, why = processes.row(SMALL, patience=2)
    assert (why, found.done, found.phases["encode"].busy) == ("not in 2 s", False, 1.5)
    text = report.line(report.Entry(case=SMALL, row=found, why=why))
    assert text == "| core | small | fp32 | tiled | 128 | not in 2 s |  | not in 2 s |  |  | encode 100% |"


def test_a_row_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "command", lambda *_: [sys.executable, "-c", "raise MemoryError('no more')"])
    assert processes.row(SMALL, patience=30)[1] == "MemoryError: no more"


def test_another_checkout_is_what_runs(tmp_path: Path) -> None:
    """Its core, not this one's."""
    (tmp_path / "seesr_core").mkdir()
    (tmp_path / "seesr_core" / "__init__.py").write_text("raise RuntimeError('the other checkout')")
    assert processes.row(SMALL, 60, tmp_path)[1] == "RuntimeError: the other checkout"


def test_ratios_are_medians_over_pairs_of_runs() -> None:
    entry = report.Entry(
        case=SMALL, row=row(1.0), again=[row(2.0), row(9.0)], others=[row(2.0), row(2.0), row(3.0, 50)]
    )
    assert entry.ratio() == (1.0, 1.0)
    assert report.line(entry).endswith("| sample 100% | 1.00, 1.00 |")
    assert report.Entry(case=SMALL, row=row()).ratio() is None


def test_runs_alternate_with_the_other_checkouts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    def run(case: Case, patience: float, checkout: Path = Path("mine")) -> tuple[Row, str]:
        ran.append(checkout.name)
        return row(), ""

    monkeypatch.setattr(processes, "row", run)
    words = [
        "--places",
        "core",
        "--nets",
        "small",
        "--sides",
        "64",
        "--kinds",
        "tiled",
        "--vs",
        str(tmp_path / "theirs"),
    ]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    command.main()
    assert ran == ["mine", "theirs"] * 3


def test_runs_alternate_with_another_kind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []

    def run(case: Case, *_: object) -> tuple[Row, str]:
        ran.append(case.kind)
        found = row(1.0 if case.kind == "balanced" else 4.0)
        found.phases["decode"] = Cost(seconds=1.0, busy=1.0, peak_mib=1.0)
        return found, ""

    monkeypatch.setattr(processes, "row", run)
    words = ["--places", "core", "--nets", "small", "--sides", "64", "--kinds", "balanced", "--vs-kind", "tiled"]
    monkeypatch.setattr(sys, "argv", ["bench", *words, "--pairs", "2"])
    command.main()
    assert ran == ["balanced", "tiled"] * 2
    assert "0.40, 1.00 (sample 0.25, decode 1.00) |" in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["interrupted", "too slow", "failed"])
def test_what_was_measured_before_the_end_is_kept(
    ends: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four rows with two pairs each the second's third run does not end."""
    ran: list[str] = []

    def run(case: Case, *_: object) -> tuple[Row, str]:
        ran.append(case.name)
        if len(ran) != 7:
            return row(), ""
        if ends == "interrupted":
            raise KeyboardInterrupt
        return Row(), "not in 9 s" if ends == "too slow" else "MemoryError"

    monkeypatch.setattr(processes, "row", run)
    words = ["--places", "core", "--nets", "small", "--sides", "64", "128", "192", "256", "--kinds", "balanced"]
    rest = ["--vs-kind", "tiled", "--pairs", "2", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["bench", *words, *rest])
    stopped = ends == "interrupted"
    assert command.main() == (130 if stopped else 0)
    assert len(ran) == (7 if stopped else 16)
    found = json.loads((tmp_path / "a.json").read_text())
    begun = [[[run["done"] for run in pair] for pair in entry["pairs"]] for entry in found["rows"]]
    whole = [[True, True]] * 2
    assert begun == ([whole, whole[:1]] if stopped else [whole, [[True, True], [False, True]], whole, whole])
    second = Case(place="core", net="small", kind="balanced", side=128)
    rows = [second, replace(second, side=192), replace(second, side=256)] if stopped else [second]
    missing = [f"{case.name}: {'1 of 2 pairs' if case is second else 'not begun'}" for case in rows]
    assert found["missing"] == missing
    assert all(line in capsys.readouterr().out for line in missing[:1])
    assert report.beside(tmp_path / "a.json")[second.name].done


def test_a_killed_command_leaves_its_report(tmp_path: Path) -> None:
    """Asked to end (SIGTERM) when it has hardly begun its first row."""
    words = [sys.executable, "-m", "tools.bench", "--places", "core", "--nets", "small", "--sides", "1024"]
    path = tmp_path / "a.json"
    with subprocess.Popen(
        [*words, "--kinds", "tiled", "--json", str(path)], stdout=subprocess.PIPE, text=True
    ) as bench:
        assert bench.stdout is not None
        assert "CFG" in bench.stdout.readline()
        bench.send_signal(signal.SIGTERM)
        told = bench.stdout.read()
    assert bench.returncode == TERMINATED
    assert "Terminated." in told
    (missing,) = json.loads(path.read_text())["missing"]
    assert missing.endswith((": not begun", ": not ended"))


def test_parts_are_measured_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "host_folder", lambda: tmp_path)
    monkeypatch.setattr(processes, "row", lambda *_: (row(), ""))
    monkeypatch.setattr(processes, "part", lambda *_: {"seconds": 0.25, "busy": 0.5})
    for only, name in (("start", "start"), ("rows", "rows")):
        monkeypatch.setattr(sys, "argv", ["bench", "--sides", "64", "--only", only, "--json", str(tmp_path / only)])
        command.main()
        found = json.loads((tmp_path / only).read_text())
        assert [key for key in ("rows", "start", "price") if found.get(key)] == [name]
        assert found["missing"] == []


def test_an_earlier_report_stands_beside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "row", lambda *_: (row(3.0), ""))
    words = ["--places", "core", "--nets", "small", "--sides", "64", "--kinds", "tiled"]
    for flags in (["--json", str(tmp_path / "a.json")], ["--against", str(tmp_path / "a.json")]):
        monkeypatch.setattr(sys, "argv", ["bench", *words, *flags])
        command.main()
    assert "1.00, 1.00 |" in capsys.readouterr().out
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(SystemExit, match="should be a report of this benchmark"):
        report.beside(tmp_path / "b.json")


def test_some_kinds_are_the_hosts_only() -> None:
    found = cases(["core", "host"], ["nano"], ["fp32"], [512], ["nodes", "untiled", "three-passes"])
    assert [(case.place, case.kind) for case in found] == [
        ("core", "untiled"),
        ("host", "nodes"),
        ("host", "untiled"),
        ("host", "three-passes"),
    ]


def test_lines_through_rows(tmp_path: Path) -> None:
    line = Line.through("sample", "CPU-s", [(x, 3.0 + 2.0 * x) for x in (0.25, 1.0, 4.0)])
    assert (line.base, line.slope, line.error) == pytest.approx((3.0, 2.0, 0.0), abs=1e-9)
    assert Line.through("a", "MiB", [(1.0, 1.0), (2.0, 2.0), (3.0, 4.0)]).error > 0.1
    entries = [
        report.Entry(case=Case(side=side), row=row(side**2 / 1e6, 500 + side**2 / 1e5)) for side in (500, 1000, 2000)
    ]
    sampling, memory = lines(entries)
    assert (sampling.slope, memory.base, memory.slope) == pytest.approx((1.0, 500.0, 10.0))
    draw(tmp_path / "growth.png", [sampling, memory], "test")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
