"""A segmenter's masks on results, measured against COCO annotations: AP of instances, panoptic quality, mean IoU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from seesr_core.errors import DataError, WeightsError
from seesr_core.model_files import NANO

from ..pictures import as_picture
from ..quality.compute import SR, Case
from .detection import check_size, shared_categories
from .joint import JointLabels
from .panoptic import (
    VOID,
    Ids,
    MeanIoU,
    PanopticAnnotations,
    PanopticQuality,
    Segment,
    Segmented,
    read_panoptic,
)
from .precision import Truths, encode, why_absent

SEGSR = "SegSR"
"""Row of the labels that were denoised beside the picture."""
INSTANCES, PANOPTIC, SEMANTIC = "instances", "panoptic segments", "class maps"
SETTINGS: Mapping[str, str] = {
    INSTANCES: "COCO mask AP by pycocotools: IoU 0.50 … 0.95, 100 masks a picture, all sizes, scores from 0",
    PANOPTIC: "PQ: IoU above 0.5, scores and masks from 0.5, overlap from 0.8, stuff fused",
    SEMANTIC: "mIoU over the categories of the truth, pixels without category left out",
}


class Judged(Protocol):
    """What a segmenter does with a picture."""

    @property
    def tasks(self) -> frozenset[str]:
        """Some of INSTANCES, PANOPTIC, SEMANTIC."""
        ...

    @property
    def names(self) -> Mapping[int, str]:
        """The segmenter's categories by its own numbers, in lower case."""
        ...

    def __call__(self, picture: Image.Image, fused: Iterable[int]) -> Raw:
        """Segment a picture; `fused` are the numbers of categories without instances."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """A segmenter's answer in its own numbers."""

    instances: Sequence[tuple[np.ndarray, float, int]] = ()
    """Mask (H, W) bool, score and category of every instance."""
    panoptic: Segmented | None = None
    """The panoptic segments."""
    semantic: Ids | None = None
    """Category of each pixel of the picture."""


@dataclass(frozen=True, slots=True)
class Segmenter:
    """A transformers model with its processor."""

    model: Any
    """A universal or semantic segmentation model in evaluation mode."""
    processor: Any
    """The network's image processor."""
    tasks: frozenset[str]
    """Tasks that the segmenter can do."""

    @classmethod
    def load(cls, name: str, device: torch.device) -> Segmenter:
        """A segmenter by the hub's name or from a folder.

        Raises:
            WeightsError: it cannot be had, or is no segmenter of single pictures.
        """
        from transformers import (
            AutoImageProcessor,
            AutoModelForSemanticSegmentation,
            AutoModelForUniversalSegmentation,
        )

        reason = ""
        for kind in (AutoModelForUniversalSegmentation, AutoModelForSemanticSegmentation):
            try:
                model = kind.from_pretrained(name)
                processor = AutoImageProcessor.from_pretrained(name)
            except (OSError, ValueError, KeyError, ImportError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                continue
            if model.config.model_type == "oneformer":
                raise WeightsError(f"{name} wants a task in words beside every picture; give another segmenter.")
            tasks = frozenset(
                task
                for task, method in (
                    (INSTANCES, "post_process_instance_segmentation"),
                    (PANOPTIC, "post_process_panoptic_segmentation"),
                    (SEMANTIC, "post_process_semantic_segmentation"),
                )
                if hasattr(processor, method)
            )
            if kind is AutoModelForSemanticSegmentation:
                tasks &= {SEMANTIC}
            return cls(model.eval().to(device), processor, tasks)
        raise WeightsError(f"{name} should be a segmenter of transformers ({reason}).")

    @property
    def names(self) -> dict[int, str]:
        """Names of what it can find, in lower case."""
        return {int(number): label.lower() for number, label in self.model.config.id2label.items()}

    @torch.no_grad()
    def __call__(self, picture: Image.Image, fused: Iterable[int]) -> Raw:
        """See `Judged`."""
        inputs = self.processor(images=picture, return_tensors="pt").to(self.model.device)
        known = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        outputs, size = self.model(**known), [(picture.height, picture.width)]
        return Raw(
            instances=self._instances(outputs, size) if INSTANCES in self.tasks else (),
            panoptic=self._panoptic(outputs, size, set(fused)) if PANOPTIC in self.tasks else None,
            semantic=self._semantic(outputs, size) if SEMANTIC in self.tasks else None,
        )

    def _instances(self, outputs: Any, size: list[tuple[int, int]]) -> list[tuple[np.ndarray, float, int]]:
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=size, return_binary_maps=True
        )
        masks = found["segmentation"]
        return [
            (masks[i].cpu().numpy() > 0.5, float(part["score"]), int(part["label_id"]))
            for i, part in enumerate(found["segments_info"])
        ]

    def _panoptic(self, outputs: Any, size: list[tuple[int, int]], fused: set[int]) -> Segmented:
        (found,) = self.processor.post_process_panoptic_segmentation(
            outputs, target_sizes=size, label_ids_to_fuse=fused
        )
        # The library begins to count at 0 in some models and at 1 in others, and marks nothing by -1 or 0.
        ids = found["segmentation"].cpu().numpy().astype(np.int64) + 1
        return Segmented(ids, {int(part["id"]) + 1: Segment(int(part["label_id"])) for part in found["segments_info"]})

    def _semantic(self, outputs: Any, size: list[tuple[int, int]]) -> Ids:
        (found,) = self.processor.post_process_semantic_segmentation(outputs, target_sizes=size)
        classes: Ids = found.cpu().numpy().astype(np.int64)
        return classes


@dataclass(kw_only=True, slots=True)
class _Row:
    """What gathers for bicubic, result or original."""

    instances: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    quality: PanopticQuality = field(default_factory=PanopticQuality)
    iou: MeanIoU = field(default_factory=MeanIoU)


@dataclass(kw_only=True, slots=True)
class _Truth:
    """Annotations, and which of their categories the segmenter's numbers mean."""

    path: Path
    categories: dict[int, str]
    """Annotated categories that the segmenter knows, by id."""
    own: dict[int, int]
    """Category of the annotations by the segmenter's number."""
    unknown: list[str]
    """Annotated categories that the segmenter lacks."""
    pictures: set[str]
    """Names of the pictures that are annotated."""

    @classmethod
    def of(
        cls,
        path: Path,
        name: str,
        categories: dict[int, str],
        pictures: set[str],
        names: Mapping[int, str],
        known: set[str] | None = None,
    ) -> _Truth:
        """What of some annotations is judged: the categories that are in `names`, and in `known` if that is given."""
        shared = shared_categories(path, name, categories, set(names.values()) if known is None else known)
        by_name = {label.lower(): number for number, label in shared.items()}
        own = {number: by_name[label] for number, label in names.items() if label in by_name}
        unknown = sorted(set(categories.values()) - set(shared.values()))
        return cls(path=path, categories=shared, own=own, unknown=unknown, pictures=pictures)


@dataclass(kw_only=True, slots=True)
class Segmentation:
    """The measurement of one folder of results."""

    name: str
    """Name of the segmenter, or of SegSR's file alone."""
    segmenter: Judged | None
    """The segmenter."""
    joint: tuple[_Truth, JointLabels] | None = None
    """Truth and SegSR, for mIoU of a row of its own."""
    instances: tuple[_Truth, Truths] | None = None
    """Truth and annotations for AP."""
    panoptic: tuple[_Truth, PanopticAnnotations] | None = None
    """Truth and annotations for PQ and mIoU."""
    absent: dict[str, str] = field(default_factory=dict)
    """Figures that there will not be, and why."""
    _rows: dict[str, _Row] = field(default_factory=dict)

    def run(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Figures of every row, in percent.

        Raises:
            SeeSRError: pictures cannot be used or do not belong to the annotations.
        """
        truths = [given[0] for given in (self.instances, self.panoptic, self.joint) if given is not None]
        annotated = [case for case in cases if any(case.name in truth.pictures for truth in truths)]
        if truths and not annotated:
            raise DataError(f"{truths[0].path} names none of the pictures, such as {cases[0].name}.")
        for case in annotated:
            self._add(case)
        return {
            "segmenter": self.name,
            "photos": len(annotated),
            "categories": len({label.lower() for truth in truths for label in truth.categories.values()}),
            "unknown_categories": sorted({label for truth in truths for label in truth.unknown}),
            "not_annotated": [case.name for case in cases if case not in annotated],
            "absent": self.absent,
            "settings": {task: SETTINGS[task] for task in sorted(self._tasks())},
            "rows": {row: self._figures(gathered) for row, gathered in self._rows.items()},
        }

    def _add(self, case: Case) -> None:
        pictures = case.load("B").pictures
        if self.instances and case.name in self.instances[1].pictures:
            check_size(case, pictures[SR], self.instances[1].pictures[case.name].size)
        truth = self.panoptic[1].read(case.name) if self.panoptic and case.name in self.panoptic[1].files else None
        if truth is not None:
            height, width = truth.ids_HW.shape
            check_size(case, pictures[SR], (width, height))
        if self.joint and truth is not None:
            shared, labels = self.joint
            raw = Raw(semantic=labels(case, (truth.ids_HW.shape[1], truth.ids_HW.shape[0])))
            _count(self._rows.setdefault(SEGSR, _Row()), raw, truth.only(shared.categories), shared.own)
        if self.segmenter is not None:
            self._add_segmented(case, pictures, truth, self.segmenter)

    def _add_segmented(
        self, case: Case, pictures: Mapping[str, torch.Tensor], truth: Segmented | None, segmenter: Judged
    ) -> None:
        stuff = self._stuff()
        for row, pixels in pictures.items():
            raw = segmenter(as_picture(pixels), stuff)
            gathered = self._rows.setdefault(row, _Row())
            if self.instances and case.name in self.instances[0].pictures:
                gathered.instances[case.name] = list(_encoded(raw, self.instances[0].own))
            if self.panoptic and truth is not None:
                _count(gathered, raw, truth.only(self.panoptic[0].categories), self.panoptic[0].own)

    def _tasks(self) -> frozenset[str]:
        return self.segmenter.tasks if self.segmenter is not None else frozenset({SEMANTIC})

    def _stuff(self) -> set[int]:
        """The segmenter's numbers of categories without instances."""
        if self.panoptic is None:
            return set()
        return {own for own, category in self.panoptic[0].own.items() if category in self.panoptic[1].stuff}

    def _figures(self, row: _Row) -> dict[str, float]:
        found = {"pq": row.quality.result(), "miou": row.iou.result()}
        figures = {key: value for key, value in found.items() if value is not None}
        if self.instances and row.instances:
            shared, truths = self.instances
            precision = truths.precision(sorted(row.instances), shared.categories, row.instances)
            figures |= {f"{key}_masks": value for key, value in precision.items()}
        return figures


def _encoded(raw: Raw, own: Mapping[int, int]) -> Iterable[dict[str, Any]]:
    for mask, score, number in raw.instances:
        if number in own:
            yield {"segmentation": encode(mask), "score": score, "category_id": own[number]}


def _count(row: _Row, raw: Raw, truth: Segmented, own: Mapping[int, int]) -> None:
    if raw.panoptic is not None:
        segments = {
            number: Segment(own[part.category])
            for number, part in raw.panoptic.segments.items()
            if part.category in own
        }
        row.quality.add(truth, Segmented(raw.panoptic.ids_HW, segments))
    if raw.semantic is not None:
        numbers = np.array([own.get(number, VOID) for number in range(int(raw.semantic.max()) + 1)])
        row.iou.add(truth.classes(), numbers[raw.semantic])


def segmentation(
    cases: Sequence[Case],
    name: str | None,
    device: torch.device,
    *,
    annotations: Path | None = None,
    panoptic: Path | None = None,
    panoptic_masks: Path | None = None,
    segsr: Path | None = None,
    model: str = NANO,
) -> dict[str, Any]:
    """AP of masks, PQ and mIoU of the segmenter on every row, in percent; what cannot be had is told in `absent`.

    With `segsr` there is a row of the labels that it denoises beside the `model`'s picture of LR; it and the segmenter
    are then judged by the categories that both know.

    Raises:
        SeeSRError: segmenter, SegSR, annotations or pictures cannot be used or do not belong together.
    """
    segmenter: Judged | None = Segmenter.load(name, device) if name is not None else None
    joint = JointLabels.load(segsr, model, device) if segsr is not None else None
    title = " and ".join(str(part) for part in (name, segsr) if part is not None)
    absent = {} if segmenter is None else _absent(str(name), segmenter, annotations, panoptic)
    work = Segmentation(name=title, segmenter=segmenter, absent=absent)
    if segmenter is not None and annotations is not None and "ap_masks" not in absent:
        read = Truths.read("segm", annotations)
        truth = _Truth.of(annotations, title, read.categories, set(read.pictures), segmenter.names)
        work.instances = truth, read
    if panoptic is not None:
        masks = read_panoptic(panoptic, panoptic_masks)
        judged = [part.names for part in (segmenter, joint) if part is not None]
        known = set.intersection(*({*names.values()} for names in judged))
        of = {"path": panoptic, "name": title, "categories": masks.categories, "pictures": set(masks.files)}
        truths = [_Truth.of(**of, names=names, known=known) for names in judged]  # type: ignore[arg-type]
        work.panoptic = truths[0], masks
        work.joint = (truths[-1], joint) if joint is not None else None
    return work.run(cases)


def _absent(name: str, segmenter: Judged, annotations: Path | None, panoptic: Path | None) -> dict[str, str]:
    """Figures of a segmenter that there will not be, and why."""
    absent = {}
    for figure, task, option, given in (
        ("ap_masks", INSTANCES, "--annotations", annotations),
        ("pq", PANOPTIC, "--panoptic", panoptic),
        ("miou", SEMANTIC, "--panoptic", panoptic),
    ):
        if given is None:
            absent[figure] = f"no {option}"
        elif task not in segmenter.tasks:
            absent[figure] = f"{name} gives no {task}"
        elif figure == "ap_masks" and why_absent():
            absent[figure] = why_absent()
    return absent
