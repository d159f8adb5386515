"""Where COCO's annotations say that something is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import coco

Boxes = NDArray[np.float64]
"""Boxes (G, 4): left, top, right, bottom in pixels."""


@dataclass(kw_only=True, slots=True)
class Annotations:
    """What a COCO file says."""

    categories: dict[int, str]
    """Names of the categories by id."""
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Width and height by picture."""
    boxes: dict[tuple[str, int], Boxes] = field(default_factory=dict)
    """True boxes by picture and category; nothing where there is none."""


def read_annotations(path: Path) -> Annotations:
    """Read a COCO "instances" file; pictures go by their file name without suffix.

    Raises:
        DataError: it is no such file.
    """
    data, _ = coco.read_objects(coco.Instances, coco.BOXES, path)
    names = {image.id: image.name for image in data.images}
    found: dict[tuple[str, int], list[list[float]]] = {}
    for entry in data.annotations:
        left, top, width, height = entry.bbox
        box = [left, top, left + width, top + height]
        found.setdefault((names[entry.image_id], entry.category_id), []).append(box)
    return Annotations(
        categories={category.id: category.name for category in data.categories},
        sizes={image.name: image.size for image in data.images},
        boxes={key: np.array(boxes, dtype=np.float64) for key, boxes in found.items()},
    )
