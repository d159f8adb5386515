"""Reports: JSON on disk, a short Markdown table for the terminal and the README."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seesr_core.runtime.files import atomic_write

ABSENT = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A figure as a column of a table."""

    key: str
    """Name of the column's figure."""
    title: str
    """Heading of the column."""
    digits: int = 2
    """Digits after the point."""
    left: bool = False
    """Whether the column holds text, which is aligned on the left."""

    def cell(self, figures: Mapping[str, Any]) -> str:
        """The figure as text; a dash where it is absent, since 0 would be a lie."""
        value = figures.get(self.key)
        if value is None:
            return ABSENT
        return value if isinstance(value, str) else f"{value:.{self.digits}f}"


QUALITY = (
    Column(key="psnr_y", title="PSNR-Y ↑"),
    Column(key="ssim_y", title="SSIM-Y ↑", digits=4),
    Column(key="niqe", title="NIQE ↓"),
    Column(key="efficientnet_lite0", title="EfficientNet-Lite0 ↓", digits=4),
)


def markdown(corner: str, rows: Mapping[str, Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """A Markdown table with the row names under `corner`, ending in a newline."""
    lines = [[corner, *(column.title for column in columns)], ["---", *("---" if c.left else "---:" for c in columns)]]
    lines += [[name, *(column.cell(figures) for column in columns)] for name, figures in rows.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def show(text: str) -> None:
    """Write to standard output, where tables go; all else is logged to standard error."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report.

    Raises:
        ResourceError: the folder cannot be written to or the disk is full.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
