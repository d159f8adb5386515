"""What SeeSR costs, as Markdown and JSON.

    python -m tools.bench [--places core host] [--nets nano full small] [--dtypes fp32 bf16 fp16]
        [--sides 512 1024 2048 4096] [--kinds tiled balanced nodes untiled three-passes] [--steps 2] [--tile 512]
        [--sampling-only] [--json FILE] [--against FILE] [--vs PATH | --vs-kind KIND] [--pairs 3] [--growth PNG]
        [--only rows start price] [--patience 1800]

Processor time, wall time, peak memory, network calls and shares of the time against the image's side, each row in a
process of its own. A row that does not end in time keeps what is known of it. The report is written after every run:
one that is interrupted has all that was measured and says what is missing. "nodes" is the graph of the small nodes,
which hand pictures on as the host's float IMAGE; the other rows of the host do what SeeSR Upscale does, which keeps
8 bits; "three-passes" puts pictures above 1536² through the host's own tilers of the autoencoder. `--against` sets an
earlier report (`--json`) beside it; `--vs` another checkout and `--vs-kind` another kind, whose runs alternate with
those of each row. With the host: also what the plugin adds to its start, and the price of RCA and ControlNet beside
their arithmetic; `--only rows` leaves both out. Runs on the GPU if there is one. The host's rows need a ComfyUI at
`$COMFYUI_PATH` and its requirements; networks by the rule ("full", "small") are sampled alone there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.host.locate import host_folder

from . import growth, processes, report
from .case import CFG, DTYPES, KINDS, NETS, PLACES, Case, cases
from .watch import tell

PARTS = ("rows", "start", "price")
_START_BUDGET_S = 0.5


def main() -> int:
    """Command line; returns the exit status. `--part` is how the rows' processes are started."""
    options = _parser().parse_args()
    if options.part:
        processes.run_part(*options.part)
        return 0
    if "host" in options.places and host_folder() is None:
        raise SystemExit("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI; --places core needs none")
    return _run(_report(options), options)


def _run(found: report.Report, options: argparse.Namespace) -> int:
    """Measure and tell; the exit status. Here and not above: a row's process may import another checkout's core."""
    from seesr_core.runtime.signals import exit_code, how, terminable

    status = 0
    with terminable():
        try:
            _measure(found, options)
        except KeyboardInterrupt as error:
            tell(f"\n{how(error)}.")
            status = exit_code(error)
        _tell_rest(found, options)
        found.save()
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="What SeeSR costs.")
    for name, choices, default in (
        ("places", PLACES, ["host"]),
        ("nets", NETS, ["nano"]),
        ("dtypes", DTYPES, ["fp32"]),
        ("kinds", KINDS, ["tiled", "nodes", "untiled"]),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=default, help=f"rows of which {name}")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="result's side, pixels")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps of each run")
    parser.add_argument("--cfg", type=float, default=CFG, help="guidance scale")
    parser.add_argument("--tile", type=int, default=512, help="tile size in pixels")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which parts to measure, else all")
    parser.add_argument("--sampling-only", action="store_true", help="draw latents instead of encoding, do not decode")
    parser.add_argument("--patience", type=float, default=1800, help="seconds after which a row is stopped")
    parser.add_argument("--json", type=Path, help="report to write")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--against", type=Path, metavar="FILE", help="an earlier report to compare with")
    other.add_argument("--vs", type=Path, metavar="PATH", help="another checkout, run alternately")
    other.add_argument("--vs-kind", choices=KINDS, help="another kind of the same row, run alternately")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each row beside the other ones")
    parser.add_argument("--growth", type=Path, metavar="PNG", help="fit straight lines over the sides and draw them")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    return parser


def _report(options: argparse.Namespace) -> report.Report:
    """The report that is asked for, with nothing in it yet."""
    wanted = cases(options.places, options.nets, options.dtypes, options.sides, options.kinds, **_same(options))
    pairs = options.pairs if options.vs or options.vs_kind else 0
    return report.Report(wanted=list(wanted) if "rows" in options.only else [], pairs=pairs, file=options.json)


def _same(options: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common."""
    return {"steps": options.steps, "cfg": options.cfg, "tile": options.tile, "alone": options.sampling_only}


def _measure(found: report.Report, options: argparse.Namespace) -> None:
    """Run all that is asked for; every row's line is told as soon as it is known, and every run kept."""
    known = report.beside(options.against) if options.against else {}
    found.save()
    if found.wanted:
        tell(report.head(Case(**_same(options)), _other(options)))
    for case in found.wanted:
        entry = report.Entry(case=case, why="not ended")
        entry.others = [known[case.name]] if case.name in known else []
        found.entries.append(entry)
        try:
            for _ in _runs(entry, found.pairs, options):
                found.save()
        finally:
            tell(report.line(entry))
    extra = {"start": _start, "price": _price} if "host" in options.places and not options.sampling_only else {}
    for name, measure in extra.items():
        if name in options.only:
            found.more[name] = measure()
            found.save()


def _other(options: argparse.Namespace) -> str:
    """The name of what the rows are compared with, if anything."""
    file = options.against or options.vs
    return f"those of {file.name}" if file else options.vs_kind or ""


def _runs(entry: report.Entry, pairs: int, options: argparse.Namespace) -> Iterator[None]:
    """A case and what it is compared with, in turn; stops after each run, and for good after a pair that did not end.

    What is compared has the same circumstances but for its checkout or its kind.
    """
    entry.row, entry.why = processes.row(entry.case, options.patience)
    yield
    other = replace(entry.case, kind=options.vs_kind or entry.case.kind)
    for number in range(pairs):
        if number:
            entry.again.append(processes.row(entry.case, options.patience)[0])
            yield
        entry.others.append(processes.row(other, options.patience, options.vs or processes.ROOT)[0])
        yield
        if len(entry.pairs()) <= number:
            break


def _tell_rest(found: report.Report, options: argparse.Namespace) -> None:
    """What the rows say together, and which are missing."""
    lines = report.compare(found.entries)
    if options.growth and found.entries:
        fitted, case = growth.lines(found.entries), found.entries[0].case
        growth.draw(options.growth, fitted, f"{case.net} in the {case.place}, {case.kind}, {case.steps} steps")
        found.more["growth"] = [line.text() for line in fitted]
        lines += found.more["growth"]
    for text in (*lines, *(f"Missing: {text}" for text in found.missing())):
        tell(f"\n{text}")


def _start() -> dict[str, float]:
    """What the plugin adds to the host's start: medians of three."""
    seconds, busy = (
        statistics.median(column) for column in zip(*(processes.part("start").values() for _ in range(3)), strict=True)
    )
    verdict = "within" if seconds <= _START_BUDGET_S else "above"
    added = f"{seconds:.2f} s ({busy:.2f} s of processor time)"
    tell(f"\nThe plugin adds {added} to the host's start, {verdict} {_START_BUDGET_S} s; sockets were blocked.")
    return {"seconds": seconds, "busy": busy}


def _price() -> dict[str, dict[str, float]]:
    """What a call costs bare and with SeeSR."""
    found: dict[str, dict[str, float]] = processes.part("price", 64)
    tell("\n| one call at 512 px, both prompts | ms | G multiply-adds |")
    tell("|---|---:|---:|")
    for name in ("bare", "seesr"):
        tell(f"| {name} | {found[name]['ms']:.0f} | {found[name]['gmac']:.2f} |")
    time_ratio, work_ratio = (found["seesr"][key] / found["bare"][key] for key in ("ms", "gmac"))
    tell(f"\nSeeSR over the bare U-Net: time × {time_ratio:.2f}, arithmetic × {work_ratio:.2f}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
