"""How time and memory grow with the picture: straight lines through the rows of the benchmark, and their drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .report import Entry

MEGAPIXEL = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Least squares of one figure over megapixels, each point weighted by 1 / figure: relative errors count."""

    name: str
    """The phase and what of it."""
    unit: str
    """Unit of the figure."""
    megapixels: tuple[float, ...]
    """Sizes that were measured."""
    figures: tuple[float, ...]
    """What was measured at each."""
    base: float
    """The line at 0."""
    slope: float
    """What a megapixel adds."""

    @classmethod
    def through(cls, name: str, unit: str, points: Sequence[tuple[float, float]]) -> Line:
        """The line through (megapixels, figure) of at least two sizes."""
        x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        slope, base = np.polyfit(x, y, 1, w=1 / y)
        return cls(name=name, unit=unit, megapixels=tuple(x), figures=tuple(y), base=float(base), slope=float(slope))

    def at(self, megapixels: float) -> float:
        """The line's value."""
        return self.base + self.slope * megapixels

    @property
    def error(self) -> float:
        """The largest relative distance of a figure from the line."""
        pairs = zip(self.megapixels, self.figures, strict=True)
        return max(abs(self.at(x) / y - 1) for x, y in pairs)

    def text(self) -> str:
        """The line in words."""
        return (
            f"{self.name}: {self.base:.3g} {self.unit} + {self.slope:.3g} {self.unit} a megapixel, "
            f"within {self.error:.0%} of every row"
        )


def lines(entries: Sequence[Entry]) -> list[Line]:
    """Processor time of every phase and peak memory of the whole, over the sizes that were measured."""
    found = []
    done = [entry for entry in entries if entry.row.done]
    for phase in dict.fromkeys(name for entry in done for name in entry.row.phases):
        points = [(_size(e), e.row.phases[phase].busy) for e in done if phase in e.row.phases]
        found += _line(phase, "CPU-s", points)
    return [*found, *_line("peak memory", "MiB", [(_size(e), e.row.whole.peak_mib) for e in done])]


def _line(name: str, unit: str, points: Sequence[tuple[float, float]]) -> list[Line]:
    points = [(x, y) for x, y in points if y > 0]
    return [Line.through(name, unit, points)] if len({x for x, _ in points}) > 1 else []


def _size(entry: Entry) -> float:
    return entry.case.side**2 / MEGAPIXEL


def draw(path: Path, fitted: Sequence[Line], title: str) -> None:
    """A PNG with two fields over megapixels: processor time of each phase, and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, fields = pyplot.subplots(1, 2, figsize=(10, 4), dpi=100)
    for field, unit in zip(fields, ("CPU-s", "MiB"), strict=True):
        for one in (one for one in fitted if one.unit == unit):
            _plot(field, one)
        sizes = sorted({x for one in fitted for x in one.megapixels})
        field.set(xlabel="megapixels of the result", ylabel=unit, xscale="log")
        field.set(yscale="log" if unit == "CPU-s" else "linear", xticks=sizes, xticklabels=[f"{x:.2g}" for x in sizes])
        field.minorticks_off()
        field.grid(True, alpha=0.3)
        field.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _plot(field: Any, line: Line) -> None:
    x = np.geomspace(min(line.megapixels), max(line.megapixels), 50)
    y = line.base + line.slope * x
    (drawn,) = field.plot(x[y > 0], y[y > 0], label=line.name)
    field.plot(line.megapixels, line.figures, "o", color=drawn.get_color())
