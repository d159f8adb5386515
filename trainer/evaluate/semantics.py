"""`python -m trainer.evaluate semantics`: does a result show what the original shows? The idea of the paper's Table 3.

Tags: a tagger's words on HR are the truth, its scores on SR (and on bicubic) rank them. Mean average precision comes
over tags (each ranks the pictures; only tags that are on some pictures, not all, can tell) and over pictures (each
ranks the tags). Objects: boxes of a detector on SR against COCO annotations, beside those on bicubic and on HR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from seesr_core.dape import DAPE
from seesr_core.devices import AUTO, choose_device
from seesr_core.errors import DataError, SettingsError

from .. import command
from ..data import seeded
from ..stage1 import read_teacher
from .compute import BICUBIC, HR, SR, Case
from .dape import precision_rows, run_tagger, section, tagger_input
from .detection import detection
from .folders import Folders
from .folders import Options as Pictures
from .protocols import ProtocolName
from .ranking import resamples
from .report import Column, markdown, show, write_json

_STREAM = 26
_COLUMNS = (
    Column(key="map_tags", title="mAP over tags, % ↑"),
    Column(key="map_photos", title="mAP over pictures, % ↑"),
)


_BOXES = (
    Column(key="ap", title="AP ↑", digits=1),
    Column(key="ap50", title="AP50 ↑", digits=1),
    Column(key="ap75", title="AP75 ↑", digits=1),
)


@dataclass(kw_only=True, slots=True)
class Options:
    """Compare what is recognised on results with what is recognised on, or known of, the originals."""

    sr: Path
    """Folder of results."""
    hr: Path
    """Folder of originals."""
    json: Path
    """Report to write."""
    lr: Path | None = None
    """Folder of the photos that were upscaled, to be compared by bicubic."""
    tagger: Path | None = None
    """A tagger: `dape*.safetensors` format, or RAM's file with --tag-lists."""
    tag_lists: Path | None = None
    """Folder with RAM's tag lists, for RAM's published file."""
    annotations: Path | None = None
    """COCO "instances" file of the originals, for --detector."""
    detector: str | None = None
    """An object detector of transformers, by the hub's name or a folder."""
    protocol: ProtocolName = "B"
    """A: 512² results of 128² centre crops. B: whole images, as annotations need them."""
    resamples: int = 1000
    """Bootstrap resamples."""
    device: str = AUTO
    """Where the networks run."""

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise SettingsError(f"An interval needs at least 2 resamples, not {self.resamples}.")
        if (self.annotations is None) != (self.detector is None):
            raise SettingsError("--annotations and --detector belong together; give both or neither.")
        if self.tagger is None and self.detector is None:
            raise SettingsError("Nothing to compare by: give --tagger, or --detector with --annotations.")
        if self.detector is not None and self.protocol == "A":
            raise SettingsError("Annotations are for whole images: choose --protocol B with --detector.")


def evaluate(options: Options) -> dict[str, Any]:
    """Measure; writes and returns the report.

    Raises:
        SeeSRError: folders or files that cannot be used.
    """
    pictures = Pictures(sr=options.sr, json=options.json, hr=options.hr, lr=options.lr, protocol=options.protocol)
    folders = Folders.read(pictures)
    report = {
        "protocol": options.protocol,
        "pictures": len(folders.cases),
        "unmatched": folders.unmatched,
        "tags": agreement(folders.cases, options.tagger, options) if options.tagger else {},
        "objects": _objects(folders.cases, options),
    }
    write_json(options.json, report)
    return report


def _objects(cases: Sequence[Case], options: Options) -> dict[str, Any]:
    if options.annotations is None or options.detector is None:
        return {}
    return detection(cases, options.annotations, options.detector, choose_device(options.device))


@torch.no_grad()
def agreement(cases: Sequence[Case], path: Path, options: Options) -> dict[str, Any]:
    """How well a tagger's scores on results rank the words that it has for the originals.

    Raises:
        SeeSRError: pictures or tagger cannot be used, or the tagger says the same of all originals.
    """
    tagger, vocabulary = read_teacher(path, options.tag_lists)
    logits = _logits(tagger, cases, options.protocol)
    believed = logits.pop(HR).sigmoid() > vocabulary.thresholds
    telling = believed.any(0) & ~believed.all(0)
    if not telling.any():
        raise DataError(
            f"{path} says the same of all {len(cases)} originals, so there is nothing to rank; give more pictures."
        )
    weights = resamples(len(cases), options.resamples, seeded(_STREAM))
    return {
        "photos": len(cases),
        "tags": int(telling.sum()),
        "truth": "the tagger's own words on HR (score above its threshold)",
        "tagger": str(path),
        "rows": precision_rows(logits, believed, telling, weights),
    }


def _logits(tagger: DAPE, cases: Sequence[Case], protocol: ProtocolName) -> dict[str, torch.Tensor]:
    """Scores of every row (N, T), one picture's pixels in memory at a time."""
    size = tagger.config.swin.image_size
    rows: dict[str, list[torch.Tensor]] = {row: [] for row in (BICUBIC, SR, HR) if row in cases[0].rows}
    for case in cases:
        pictures = case.load(protocol).pictures
        for row, parts in rows.items():
            parts.append(run_tagger(tagger, [tagger_input(pictures[row], size)]).logits_BN)
    return {row: torch.cat(parts) for row, parts in rows.items()}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = []
    if tags := report["tags"]:
        parts.append(section("tags of HR found", tags, _COLUMNS))
    if objects := report["objects"]:
        corner = f"objects: {objects['photos']} photos, {objects['categories']} categories"
        parts.append(markdown(corner, objects["rows"], _BOXES) + _left_out(objects))
    lonely = (f"Only in --{kind}, left out: {', '.join(names)}.\n" for kind, names in report["unmatched"].items())
    return "\n".join(filter(None, (*parts, "".join(lonely))))


def _left_out(objects: dict[str, Any]) -> str:
    """What the table is not about."""
    names = {
        "Categories that the detector lacks": "unknown_categories",
        "Pictures without annotations": "not_annotated",
    }
    return "".join(f"{what}: {', '.join(objects[key])}.\n" for what, key in names.items() if objects[key])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def action() -> None:
        show(table(evaluate(tyro.cli(Options, args=argv, prog="python -m trainer.evaluate semantics"))))

    return command.run(action)
