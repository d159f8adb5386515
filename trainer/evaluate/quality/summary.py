"""From outcomes of single pictures to means with intervals, and the tables that show them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seesr_core.runtime.files import atomic_write

from ...data.order import Stream, seeded
from ..report.intervals import Estimate, mean_estimate, resamples
from ..report.tables import ABSENT, Column, markdown
from .builds import Builds
from .compute import BICUBIC, SR, Rows
from .measure import means
from .metrics import BY_KEY, METRICS, Facts, Metric, Outcome
from .paper import SETS, Dataset, table2
from .protocols import PROTOCOLS, ProtocolName

RESAMPLES = 1000
Summary = dict[str, Any]


def summarize(rows: Rows, sets: Mapping[str, Mapping[str, Outcome]]) -> dict[str, Summary]:
    """Summary by row: means, how many pictures they are over, 95 % intervals, single figures, and why some lack."""
    summaries: dict[str, Summary] = {}
    for row, pictures in rows.items():
        figures = _values(pictures)
        mean, count = means(figures.values())
        of_set = sets.get(row, {})
        mean |= {key: outcome.value for key, outcome in of_set.items() if outcome.value is not None}
        summaries[row] = {
            "mean": mean,
            "count": count | {key: len(pictures) for key in of_set if key in mean},
            "interval": _intervals(figures),
            "missing": _missing(pictures, of_set),
            "pictures": figures,
        }
    return summaries


def _values(pictures: Mapping[str, Mapping[str, Outcome]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: outcome.value for key, outcome in figures.items() if outcome.value is not None}
        for name, figures in pictures.items()
    }


def _missing(
    pictures: Mapping[str, Mapping[str, Outcome]], of_set: Mapping[str, Outcome]
) -> dict[str, dict[str, list[str]]]:
    """Reasons by metric, and the pictures that each holds for."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, figures in pictures.items():
        for key, outcome in figures.items():
            if outcome.value is None:
                found.setdefault(key, {}).setdefault(outcome.why, []).append(name)
    return found | {key: {outcome.why: ["the set"]} for key, outcome in of_set.items() if outcome.value is None}


def _intervals(figures: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """95 % bootstrap intervals of the means; none for a single picture."""
    found = {}
    for key in dict.fromkeys(key for values in figures.values() for key in values):
        values = torch.tensor([own[key] for own in figures.values() if key in own], dtype=torch.float64)
        if len(values) > 1:
            estimate = photo_estimate(values)
            found[key] = [estimate.low, estimate.high]
    return found


def photo_estimate(values: torch.Tensor) -> Estimate:
    """The mean of figures of photos, or of their differences (N,), with its 95 % bootstrap interval."""
    return mean_estimate(values, resamples(len(values), RESAMPLES, seeded(Stream.SUMMARY_INTERVAL)))


def differences(summaries: Mapping[str, Summary]) -> dict[str, dict[str, float]]:
    """SR − bicubic over the pictures that both have a figure of, with 95 % intervals."""
    if BICUBIC not in summaries:
        return {}
    sr, bicubic = (summaries[row]["pictures"] for row in (SR, BICUBIC))
    found = {}
    for key in summaries[SR]["mean"]:
        pairs = [(own[key], bicubic[name][key]) for name, own in sr.items() if key in own and key in bicubic[name]]
        if len(pairs) > 1:
            values = torch.tensor(pairs, dtype=torch.float64)
            found[key] = photo_estimate(values[:, 0] - values[:, 1])._asdict()
    return found


def settings(builds: Builds, protocol: ProtocolName) -> dict[str, dict[str, str]]:
    """How every figure is computed."""
    facts: dict[str, Facts] = {key: build.facts for key, build in builds.pictures.items()}
    facts |= {key: build.facts for key, build in builds.sets.items()}
    return {
        key: {
            "build": facts[key].build,
            "weights": facts[key].weights,
            "colour": f"{facts[key].colour}, from 8-bit files",
            "crop": f"protocol {protocol}: {PROTOCOLS[protocol].split(';')[0]}; no border cut off",
            "resize": facts[key].resize,
            "remark": facts[key].remark,
        }
        for key in BY_KEY
        if key in facts
    }


def table(report: Mapping[str, Any]) -> str:
    """A report as Markdown: figures with intervals, the paper's rows below ours, settings, and what is missing."""
    columns, rows = cells_of(report)
    corner = f"{report['pictures']} picture{'s' * (report['pictures'] != 1)}, protocol {report['protocol']['name']}"
    lines = "".join(f"{line}\n" for line in remarks(report))
    return "\n".join(filter(None, (markdown(corner, rows, columns), _settings_table(report), lines)))


def cells_of(report: Mapping[str, Any]) -> tuple[list[Column], dict[str, dict[str, Any]]]:
    """The table of figures: its columns, and its rows by title."""
    paper: Mapping[str, Mapping[str, float]] = report["paper"].get("rows", {})
    shown = {*report["metrics"], *(key for row in paper.values() for key in row)}
    columns = [metric.column for metric in METRICS if metric.key in shown]
    rows: dict[str, dict[str, Any]] = {title: _cells(row, columns) for title, row in report["rows"].items()}
    if report["difference"]:
        rows[f"{SR} − {BICUBIC}"] = {k: _difference(BY_KEY[k], value) for k, value in report["difference"].items()}
    return columns, rows | {f"{method} (paper, Table 2)": dict(figures) for method, figures in paper.items()}


def _cells(summary: Summary, columns: Sequence[Column]) -> dict[str, str]:
    cells = {column.key: column.cell(summary["mean"]) for column in columns}
    for column in columns:
        if column.key in summary["interval"]:
            low, high = (f"{end:.{column.digits}f}" for end in summary["interval"][column.key])
            cells[column.key] += f" [{low}, {high}]"
    return cells


def _difference(metric: Metric, value: Mapping[str, float]) -> str:
    return Estimate(**value).text(metric.digits, signed=True)


def _comparable(report: Mapping[str, Any]) -> str:
    dataset: Dataset = report["paper"]["dataset"]
    facts = SETS[dataset]
    note = f"; {facts.note}" if facts.note else ""
    return (
        f"Paper: Table 2, {dataset}, {facts.pictures} pictures, protocol {facts.protocol}{note}. Ours are "
        f"{report['pictures']} pictures; a comparison holds only on the same pictures and for the same metric build."
    )


def _settings_table(report: Mapping[str, Any]) -> str:
    fields = ("build", "weights", "colour", "crop", "resize", "remark")
    columns = [Column(key=field, title=field, left=True) for field in fields]
    rows = {
        BY_KEY[key].label: {field: text or ABSENT for field, text in facts.items()}
        for key, facts in report["metrics"].items()
    }
    return markdown("figure", rows, columns) if rows else ""


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures has to know besides: what is missing, what did not match, what was changed."""
    lines = [_comparable(report)] if report["paper"] else []
    for reason in dict.fromkeys(report["absent"].values()):
        names = (BY_KEY[key].label for key, why in report["absent"].items() if why == reason)
        lines.append(f"{', '.join(names)} absent: {reason}.")
    for row, summary in report["rows"].items():
        for key, reasons in summary["missing"].items():
            lines += [f"{row}: no {BY_KEY[key].label} of {_some(names)}: {why}." for why, names in reasons.items()]
    lines += [f"Only in --{kind}, left out: {', '.join(names)}." for kind, names in report["unmatched"].items()]
    lines += [f"{note}: {_some(names)}." for note, names in report["notes"].items()]
    if report["pictures"] > 1:
        lines.append(f"In brackets: 95 % bootstrap intervals of the mean over pictures ({RESAMPLES} resamples).")
    return lines


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def paper_rows(dataset: Dataset | None) -> dict[str, Any]:
    """What a report says about the paper."""
    return {} if dataset is None else {"dataset": dataset, "table": 2, "rows": table2(dataset)}


def write_csv(path: Path, report: Mapping[str, Any]) -> None:
    """One line a picture and row; a figure that is missing is an empty field.

    Raises:
        ResourceError: it cannot be written.
    """
    keys = list(report["metrics"])
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["picture", "row", *keys])
    for name in report["rows"][SR]["pictures"]:
        for row, summary in report["rows"].items():
            figures = summary["pictures"][name]
            lines.writerow([name, row, *(repr(figures[key]) if key in figures else "" for key in keys)])
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue(), "utf-8")


def worst_first(report: Mapping[str, Any], key: str | None = None) -> tuple[str, list[str]]:
    """The metric that decides, and the pictures from worst to best SR by it; those without a figure come last.

    By default LPIPS decides, else DISTS, PSNR, or the first that there is.
    """
    pictures: Mapping[str, Mapping[str, float]] = report["rows"][SR]["pictures"]
    there = {metric for figures in pictures.values() for metric in figures}
    key = key or next((name for name in ("lpips", "dists", "psnr_y", *BY_KEY) if name in there), "")
    if key not in there:
        return "", sorted(pictures)
    sign = -1 if BY_KEY[key].lower_is_better else 1
    return key, sorted(pictures, key=lambda name: sign * pictures[name].get(key, sign * float("inf")))
