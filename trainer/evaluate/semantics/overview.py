"""Recognition in one table, the paper's kind (Table 3): a row a version of the pictures, a column a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..quality.compute import BICUBIC, HR, SR
from ..quality.paper import SemanticDataset, table3
from ..report.tables import Column, markdown
from .segmentation import SEGSR

TITLES: Mapping[str, str] = {
    "tags": "tags of HR, mAP",
    "pq": "PQ",
    "ap_boxes": "box AP",
    "ap_masks": "mask AP",
    "miou": "mIoU",
}
"""Figures in percent, higher is better."""
_PAPER = {
    "pq": "Panoptic Segmentation (PQ)",
    "ap_boxes": "Object Detection (AP)",
    "ap_masks": "Instance Segmentation (AP)",
    "miou": "Semantic Segmentation (mIOU)",
}
_PARTS = {
    "tags": ("tags", "map_tags"),
    "pq": ("segments", "pq"),
    "ap_boxes": ("objects", "ap"),
    "ap_masks": ("segments", "ap_masks"),
    "miou": ("segments", "miou"),
}
"""Where a report has them."""


def paper_rows(dataset: SemanticDataset | None) -> dict[str, Any]:
    """What a report says about the paper; a figure that is not known there is not in it."""
    if dataset is None:
        return {}
    rows = {
        method: {key: figures[name] for key, name in _PAPER.items() if name in figures}
        for method, figures in table3().items()
    }
    return {"dataset": dataset, "table": 3, "rows": rows}


def overview(report: Mapping[str, Any]) -> str:
    """The table as Markdown; columns that nobody has a figure for are left out."""
    rows = {_title(row, report): _figures(row, report) for row in (BICUBIC, SR, HR, SEGSR)}
    rows = {title: figures for title, figures in rows.items() if figures}
    paper: Mapping[str, Mapping[str, float]] = report["paper"].get("rows", {})
    rows |= {f"{method} (paper, Table 3)": dict(figures) for method, figures in paper.items()}
    columns = [
        Column(key=key, title=f"{title} ↑", digits=1)
        for key, title in TITLES.items()
        if any(key in figures for figures in rows.values())
    ]
    text = markdown(f"recognised on {report['pictures']} pictures, %", rows, columns)
    return text + (_comparable(report) if paper else "")


def _title(row: str, report: Mapping[str, Any]) -> str:
    return {SR: report["name"], HR: "HR (GT)", SEGSR: "SegSR, labels of its own"}.get(row, row)


def _figures(row: str, report: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for key, (part, name) in _PARTS.items():
        value = report[part].get("rows", {}).get(row, {}).get(name)
        if value is not None:
            found[key] = value["value"] if isinstance(value, Mapping) else value
    return found


def _comparable(report: Mapping[str, Any]) -> str:
    networks = [report[part].get(kind) for part, kind in (("objects", "detector"), ("segments", "segmenter"))]
    named = ", ".join(str(network) for network in networks if network) or "no detector and no segmenter"
    return (
        f"Paper: Table 3, {report['paper']['dataset']}, by networks of its own. Ours: {report['pictures']} pictures, "
        f"{named}. Figures compare only on the same pictures by the same networks.\n"
    )
