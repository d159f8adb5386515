"""A detector's boxes on results, measured against COCO annotations: what a person could no longer point at is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seesr_core.errors import DataError, WeightsError

from ..pictures import as_picture
from ..quality.compute import BICUBIC, HR, SR, Case
from .precision import Truths

SETTINGS = "COCO box AP by pycocotools: IoU 0.50 … 0.95, 101 recalls, 100 boxes a category and picture, all sizes"


@dataclass(frozen=True, slots=True)
class Found:
    """The detections of one category in one picture."""

    boxes: np.ndarray
    """Detected boxes (D, 4): left, top, right, bottom in pixels."""
    scores: np.ndarray
    """Scores (D,); the higher, the surer."""


Detect = Callable[[Image.Image], dict[str, Found]]
"""Detections of a picture by the name of their category, in lower case."""


@dataclass(frozen=True, slots=True)
class Detector:
    """A transformers model with its processor."""

    model: Any
    """An object detection model in evaluation mode."""
    processor: Any
    """The network's image processor."""

    @classmethod
    def load(cls, name: str, device: torch.device) -> Detector:
        """A detector by the hub's name or from a folder.

        Raises:
            WeightsError: it cannot be had, or is no object detector.
        """
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        try:
            model = AutoModelForObjectDetection.from_pretrained(name)
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightsError(f"{name} should be an object detector of transformers ({reason}).") from error
        return cls(model.eval().to(device), processor)

    @property
    def categories(self) -> set[str]:
        """Names of what it can find, in lower case."""
        return {label.lower() for label in self.model.config.id2label.values()}

    @torch.no_grad()
    def __call__(self, picture: Image.Image) -> dict[str, Found]:
        """Every box with a score above 0."""
        inputs = self.processor(images=picture, return_tensors="pt").to(self.model.device)
        sizes = [(picture.height, picture.width)]
        result = self.processor.post_process_object_detection(self.model(**inputs), threshold=0.0, target_sizes=sizes)[
            0
        ]
        boxes, scores, labels = (result[key].double().cpu().numpy() for key in ("boxes", "scores", "labels"))
        names = self.model.config.id2label
        return {
            names[int(label)].lower(): Found(boxes[labels == label], scores[labels == label])
            for label in np.unique(labels)
        }


def detection(cases: Sequence[Case], annotations_path: Path, name: str, device: torch.device) -> dict[str, Any]:
    """AP of the detector on every row, in percent.

    Raises:
        SeeSRError: detector, annotations or pictures cannot be used or do not belong together.
    """
    detector, annotations = Detector.load(name, device), Truths.read("bbox", annotations_path)
    shared = shared_categories(annotations_path, name, annotations.categories, detector.categories)
    annotated = [case for case in cases if case.name in annotations.pictures]
    if not annotated:
        raise DataError(f"{annotations_path} names none of the pictures, such as {cases[0].name}.")
    found = _detect(annotated, detector, annotations)
    return {
        "detector": name,
        "photos": len(annotated),
        "categories": len(shared),
        "unknown_categories": sorted(set(annotations.categories.values()) - set(shared.values())),
        "not_annotated": [case.name for case in cases if case.name not in annotations.pictures],
        "settings": SETTINGS,
        "rows": {row: _score(pictures, shared, annotations) for row, pictures in found.items()},
    }


def shared_categories(path: Path, name: str, categories: dict[int, str], known: set[str]) -> dict[int, str]:
    """The annotated categories that a network knows, too, by name in lower case.

    Raises:
        DataError: there are none.
    """
    shared = {key: label for key, label in categories.items() if label.lower() in known}
    if not shared:
        raise DataError(
            f"{name} knows none of the categories of {path} by name "
            f"({', '.join(list(categories.values())[:5])} …); give a network trained on them."
        )
    return shared


def check_size(case: Case, picture_3HW: torch.Tensor, annotated: tuple[int, int]) -> None:
    """Find a result to have the size, width and height, that its annotations are for.

    Raises:
        DataError: it has another.
    """
    size = (picture_3HW.shape[2], picture_3HW.shape[1])
    if size != annotated:
        raise DataError(
            f"{case.sr} has {size[0]}×{size[1]} pixels, its annotations are for {annotated[0]}×{annotated[1]}; "
            "upscale to the annotated size."
        )


def _detect(cases: Sequence[Case], detector: Detect, annotations: Truths) -> dict[str, dict[str, dict[str, Found]]]:
    """Detections by row, picture and category."""
    found: dict[str, dict[str, dict[str, Found]]] = {row: {} for row in (BICUBIC, SR, HR) if row in cases[0].rows}
    for case in cases:
        pictures = case.load("B").pictures
        check_size(case, pictures[SR], annotations.pictures[case.name].size)
        for row, pixels in pictures.items():
            found[row][case.name] = detector(as_picture(pixels))
    return found


def _score(pictures: dict[str, dict[str, Found]], categories: dict[int, str], annotations: Truths) -> dict[str, float]:
    found = {name: list(_results(own, categories)) for name, own in pictures.items()}
    return annotations.precision(list(pictures), categories, found)


def _results(found: dict[str, Found], categories: dict[int, str]) -> Iterator[dict[str, Any]]:
    """A picture's detections as COCO writes them: left, top, width, height."""
    for key, label in categories.items():
        if own := found.get(label.lower()):
            for (left, top, right, bottom), score in zip(own.boxes.tolist(), own.scores.tolist(), strict=True):
                yield {"bbox": [left, top, right - left, bottom - top], "score": score, "category_id": key}
