"""`python -m trainer.evaluate semantics`: does a result show what the original shows? The idea of the paper's Table 3.

Tags: a tagger's words on HR are the truth, its scores on SR (and on bicubic) rank them. Mean average precision comes
over tags (each ranks the pictures; only tags that are on some pictures, not all, can tell) and over pictures (each
ranks the tags). Objects: boxes of a detector on SR against COCO annotations, beside those on bicubic and on HR.
Segments: masks, panoptic segments and class maps of a segmenter, in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seesr_core.dape import DAPE
from seesr_core.errors import DataError, SettingsError
from seesr_core.model_files import NANO
from seesr_core.runtime.devices import AUTO, choose_device
from seesr_core.runtime.files import atomic_write

from ...data.order import Stream, seeded
from ...stage1.networks import read_teacher
from ..quality.compute import BICUBIC, HR, SR, Case
from ..quality.folders import Folders
from ..quality.folders import Options as Pictures
from ..quality.paper import SemanticDataset
from ..quality.protocols import ProtocolName
from ..report.intervals import resamples
from ..report.tables import Column, markdown, show, write_json
from .dape import input_of, precision_rows, run_tagger, section
from .detection import detection
from .overview import TITLES, overview, paper_rows
from .precision import why_absent
from .segmentation import segmentation

_COLUMNS = (
    Column(key="map_tags", title="mAP over tags, % ↑"),
    Column(key="map_photos", title="mAP over pictures, % ↑"),
)


_BOXES = (
    Column(key="ap", title="AP ↑", digits=1),
    Column(key="ap50", title="AP50 ↑", digits=1),
    Column(key="ap75", title="AP75 ↑", digits=1),
)
_SEGMENTS = (
    Column(key="pq", title="PQ ↑", digits=1),
    Column(key="ap_masks", title="mask AP ↑", digits=1),
    Column(key="ap50_masks", title="mask AP50 ↑", digits=1),
    Column(key="ap75_masks", title="mask AP75 ↑", digits=1),
    Column(key="miou", title="mIoU ↑", digits=1),
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
    """COCO "instances" file of the originals, for the AP of --detector and --segmenter."""
    detector: str | None = None
    """An object detector of transformers, by the hub's name or a folder."""
    segmenter: str | None = None
    """A universal (such as Mask2Former) or semantic segmenter of transformers, by the hub's name or a folder."""
    panoptic: Path | None = None
    """COCO "panoptic" file of the originals, for PQ and mIoU of --segmenter."""
    panoptic_masks: Path | None = None
    """Folder of its PNG files; by default the one beside it of the same name."""
    segsr: Path | None = None
    """A `segsr*.safetensors`, whose labels of LR, denoised beside its picture, become a row of mIoU."""
    model: str = NANO
    """The SeeSR model that it was trained with, as `python -m seesr_core upscale --model` takes it."""
    name: str = SR
    """What the results are called in the table."""
    paper: SemanticDataset | None = None
    """Show the paper's figures of this set (Table 3) below ours."""
    markdown: Path | None = None
    """Tables to write."""
    protocol: ProtocolName = "B"
    """A: 512² results of 128² centre crops. B: whole images, as annotations need them."""
    resamples: int = 1000
    """Bootstrap resamples."""
    device: str = AUTO
    """Device that the networks run on."""

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise SettingsError(f"An interval needs at least 2 resamples, not {self.resamples}.")
        networks = [name for name in ("detector", "segmenter", "segsr") if getattr(self, name) is not None]
        if self.annotations is not None and self.detector is None and self.segmenter is None:
            raise SettingsError("--annotations is for --detector or --segmenter: give one of them, too.")
        if self.detector is not None and self.annotations is None:
            raise SettingsError("--detector is judged by --annotations: give them, too.")
        if self.detector is not None and (why := why_absent()):
            raise SettingsError(
                f"--detector is judged by average precision, but {why}: install it (pip install pycocotools), or leave "
                "out --detector."
            )
        if self.segsr is not None and (self.panoptic is None or self.lr is None):
            raise SettingsError("--segsr makes labels of --lr, which are judged by --panoptic: give both, too.")
        if (self.panoptic is not None and self.segmenter is None and self.segsr is None) or (
            self.segmenter is not None and self.annotations is None and self.panoptic is None
        ):
            raise SettingsError("--segmenter is judged by --panoptic or --annotations: they belong together.")
        if self.tagger is None and not networks:
            raise SettingsError(
                "Nothing to compare by: give --tagger, or --detector, --segmenter or --segsr with annotations."
            )
        if networks and self.protocol == "A":
            raise SettingsError(f"Annotations are for whole images: choose --protocol B with --{networks[0]}.")


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
        "segments": _segments(folders.cases, options),
        "name": options.name,
        "paper": paper_rows(options.paper),
    }
    write_json(options.json, report)
    if options.markdown is not None:
        with atomic_write(options.markdown) as temporary:
            temporary.write_text(table(report), "utf-8")
    return report


def _objects(cases: Sequence[Case], options: Options) -> dict[str, Any]:
    if options.annotations is None or options.detector is None:
        return {}
    return detection(cases, options.annotations, options.detector, choose_device(options.device))


def _segments(cases: Sequence[Case], options: Options) -> dict[str, Any]:
    if options.segmenter is None and options.segsr is None:
        return {}
    return segmentation(
        cases,
        options.segmenter,
        choose_device(options.device),
        annotations=options.annotations,
        panoptic=options.panoptic,
        panoptic_masks=options.panoptic_masks,
        segsr=options.segsr,
        model=options.model,
    )


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
    weights = resamples(len(cases), options.resamples, seeded(Stream.SEMANTICS_INTERVAL))
    return {
        "photos": len(cases),
        "tags": int(telling.sum()),
        "truth": "the tagger's own words on HR (score above its threshold)",
        "tagger": str(path),
        "rows": precision_rows(logits, believed, telling, weights),
    }


def _logits(tagger: DAPE, cases: Sequence[Case], protocol: ProtocolName) -> dict[str, torch.Tensor]:
    """Scores of every row (N, T), one picture's pixels in memory at a time."""
    size = tagger.config.image_size
    rows: dict[str, list[torch.Tensor]] = {row: [] for row in (BICUBIC, SR, HR) if row in cases[0].rows}
    for case in cases:
        pictures = case.load(protocol).pictures
        for row, parts in rows.items():
            parts.append(run_tagger(tagger, [input_of(pictures[row], size)]).logits_BN)
    return {row: torch.cat(parts) for row, parts in rows.items()}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: the paper's kind of table, then each part with its settings."""
    parts = [overview(report)]
    if tags := report["tags"]:
        parts.append(section("tags of HR found", tags, _COLUMNS))
    if objects := report["objects"]:
        parts.append(_section("objects", objects, _BOXES))
    if segments := report["segments"]:
        parts.append(_section("segments", segments, _SEGMENTS))
    lonely = (f"Only in --{kind}, left out: {', '.join(names)}.\n" for kind, names in report["unmatched"].items())
    return "\n".join(filter(None, (*parts, "".join(lonely))))


def _section(title: str, part: dict[str, Any], columns: Sequence[Column]) -> str:
    corner = f"{title}: {part['photos']} photos, {part['categories']} categories"
    shown = [column for column in columns if any(column.key in row for row in part["rows"].values())]
    return markdown(corner, part["rows"], shown) + _left_out(part)


def _left_out(part: dict[str, Any]) -> str:
    """What the table is not about."""
    names = {
        "Categories that the network lacks": "unknown_categories",
        "Pictures without annotations": "not_annotated",
    }
    lines = [f"{what}: {', '.join(part[key])}.\n" for what, key in names.items() if part[key]]
    return "".join(lines) + "".join(f"{TITLES[key]} absent: {why}.\n" for key, why in part.get("absent", {}).items())


def command(options: Options) -> None:
    """Measure, and show the tables."""
    show(table(evaluate(options)))
