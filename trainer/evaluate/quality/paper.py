"""The paper's own figures (Wu et al., CVPR 2024, Tables 2 and 3) as data; what is not known there stays unknown."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from .metrics import METRICS
from .protocols import ProtocolName

Dataset = Literal["DIV2K-Val", "RealSR", "DRealSR", "RealLR200"]
SemanticDataset = Literal["COCO-Val"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperSet:
    """A test set of Table 2."""

    pictures: int
    """How many pictures the paper measured."""
    protocol: ProtocolName
    """Protocol by which the paper cut its pictures."""
    note: str = ""
    """What is special about the figures."""


SETS: Mapping[Dataset, PaperSet] = {
    "DIV2K-Val": PaperSet(pictures=3000, protocol="A", note="random crops, degraded as in training"),
    "RealSR": PaperSet(pictures=100, protocol="A"),
    "DRealSR": PaperSet(pictures=93, protocol="A"),
    "RealLR200": PaperSet(pictures=200, protocol="B", note="NIQE of SeeSR from a second source"),
}


@lru_cache(maxsize=2)
def _table(number: int) -> tuple[dict[str, str], ...]:
    path = Path(__file__).with_name(f"paper_table{number}.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def table2(dataset: Dataset) -> dict[str, dict[str, float]]:
    """Figures by method and metric key; a figure that is not known is not in it."""
    rows = [row for row in _table(2) if row["dataset"] == dataset]
    return {row["method"]: {m.key: float(row[m.paper]) for m in METRICS if row.get(m.paper)} for row in rows}


def table3() -> dict[str, dict[str, float]]:
    """Figures of COCO-Val by method and metric, in percent; GT is what the networks find on the originals."""
    return {row["method"]: {name: float(value) for name, value in list(row.items())[3:] if value} for row in _table(3)}
