"""A page of results in one file, nothing loaded from elsewhere: tables, then LR | bicubic | SR | HR under sliders."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from seesr_core.runtime.files import atomic_write

from ..pictures import as_picture
from ..report.tables import ABSENT
from .compute import BICUBIC, HR, SR, Loaded
from .metrics import BY_KEY
from .summary import cells_of, remarks

SIDE = 1024
"""Longest side of a picture on the page."""
_LR = "LR"
_SETTINGS = ("build", "weights", "colour", "crop", "resize", "remark")


def write_page(path: Path, report: Mapping[str, Any], metric: str, cases: Iterable[tuple[str, Loaded]]) -> None:
    """Write the page.

    Args:
        path: HTML file.
        report: as written to JSON.
        metric: what the order of the cases goes by, "" for none.
        cases: name and pictures, the worst first.

    Raises:
        ResourceError: it cannot be written.
    """
    figures = [_figure(name, loaded, report) for name, loaded in cases]
    order = f"worst by {BY_KEY[metric].label} first" if metric else "by name"
    parts = {
        "INTRODUCTION": _introduction(report),
        "TABLES": _tables(report),
        "REMARKS": "".join(f'<p class="remark">{escape(line)}</p>\n' for line in remarks(report)),
        "HEADING": f"{len(figures)} of {report['pictures']} pictures, {order}",
        "SIDE": str(SIDE),
        "FIGURES": "\n".join(figures),
    }
    text = Path(__file__).with_name("page.html").read_text("utf-8")
    for name, part in parts.items():
        text = text.replace(f"@@{name}@@", part)
    with atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


def _introduction(report: Mapping[str, Any]) -> str:
    protocol = report["protocol"]
    folders = ", ".join(f"{kind.upper()} {escape(folder)}" for kind, folder in report["folders"].items())
    return f"<p>Protocol {protocol['name']}: {escape(protocol['means'])}. {report['pictures']} pictures. {folders}.</p>"


def _tables(report: Mapping[str, Any]) -> str:
    columns, rows = cells_of(report)
    body = "".join(
        f"<tr{' class=paper' if '(paper' in title else ''}><td>{escape(title)}</td>"
        + "".join(f"<td>{_two_lines(column.cell(cells))}</td>" for column in columns)
        + "</tr>\n"
        for title, cells in rows.items()
    )
    heads = "".join(f"<th>{escape(column.title)}</th>" for column in columns)
    figures = f'<div class="scroll"><table class="figures">\n<tr><th></th>{heads}</tr>\n{body}</table></div>\n'
    return figures + _settings(report)


def _two_lines(cell: str) -> str:
    """A figure, its interval below it."""
    value, bracket, interval = cell.partition(" [")
    return f"{escape(value)}<br><small>[{escape(interval)}</small>" if bracket else escape(value)


def _settings(report: Mapping[str, Any]) -> str:
    lines = [[BY_KEY[key].label, *(facts[name] or ABSENT for name in _SETTINGS)] for key, facts in _facts(report)]
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>\n" for line in lines)
    heads = "".join(f"<th>{name}</th>" for name in ("figure", *_SETTINGS))
    table = f'<div class="scroll"><table class="text">\n<tr>{heads}</tr>\n{body}</table></div>\n'
    return f"<h2>How the figures are computed</h2>\n{table}"


def _facts(report: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, str]]]:
    return report["metrics"].items()


def _figure(name: str, loaded: Loaded, report: Mapping[str, Any]) -> str:
    """One case: its figures, the stacked pictures, the slider and the choice of sides."""
    versions = _versions(loaded)
    titles = list(versions)
    left = titles.index(BICUBIC) if BICUBIC in versions else 0
    width, height = versions[SR].size
    images = "".join(_image(title, picture) for title, picture in versions.items())
    return (
        f"<figure>\n<figcaption><b>{escape(name)}</b>{_figures(name, report)}</figcaption>\n"
        f'<div class="stage" style="width:{width}px;aspect-ratio:{width}/{height}">\n{images}</div>\n'
        f'<div class="controls" style="max-width:{max(width, 400)}px"><label>left {_choice(titles, left)}</label>'
        f'<input type="range" min="0" max="100" step="0.1" value="50" aria-label="Where the line is">'
        f"<label>right {_choice(titles, titles.index(SR))}</label></div>\n</figure>"
    )


def _versions(loaded: Loaded) -> dict[str, Image.Image]:
    """What there is of LR, bicubic, SR and HR, at one size or, for LR, the same part of the picture."""
    full = {row: as_picture(loaded.pictures[row]) for row in (BICUBIC, SR, HR) if row in loaded.pictures}
    shown = {row: _centre(picture, picture.size) for row, picture in full.items()}
    return ({_LR: _centre(loaded.lr, full[SR].size)} if loaded.lr else {}) | shown


def _centre(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The part of `picture` that shows the central SIDE² of the same picture at `size`."""
    boxes = []
    for own, full in zip(picture.size, size, strict=True):
        kept = min(full, SIDE)
        boxes.append((round((full - kept) / 2 * own / full), round((full + kept) / 2 * own / full)))
    (left, right), (top, bottom) = boxes
    return picture.crop((left, top, right, bottom))


def _image(title: str, picture: Image.Image) -> str:
    encoded = io.BytesIO()
    lossless = title == _LR
    picture.save(encoded, "WEBP", lossless=lossless, quality=95, method=2)
    data = base64.b64encode(encoded.getvalue()).decode("ascii")
    kind = ' class="pixels"' if lossless else ""
    return f'<img{kind} alt="{escape(title)}" draggable="false" src="data:image/webp;base64,{data}">\n'


def _choice(titles: Sequence[str], chosen: int) -> str:
    options = (
        f'<option value="{index}"{" selected" if index == chosen else ""}>{escape(title)}</option>'
        for index, title in enumerate(titles)
    )
    return f"<select>{''.join(options)}</select>"


def _figures(name: str, report: Mapping[str, Any]) -> str:
    """Every figure of the picture, SR with bicubic's in brackets."""
    rows = {row: summary["pictures"].get(name, {}) for row, summary in report["rows"].items()}
    texts = []
    for key in report["metrics"]:
        metric = BY_KEY[key]
        if metric.of_set:
            continue
        beside = f" (bicubic {metric.column.cell(rows[BICUBIC])})" if BICUBIC in rows else ""
        texts.append(f"{metric.title} {metric.column.cell(rows[SR])}{beside}")
    return f"<span>{escape(' · '.join(texts))}</span>"
