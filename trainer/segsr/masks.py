"""The labels of training photos, in the layouts of the usual data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from seesr_core.errors import DataError
from seesr_core.segsr.labels import VOID, check_labels
from seesr_core.segsr.model import ClassList

from ..data.fingerprints import digest
from ..data.photos import Photo
from ..evaluate.semantics.panoptic import PanopticAnnotations, read_panoptic
from .classes import FILE, class_list, read_classes, read_labels

Layout = Literal["plain", "ade20k", "coco-stuff", "cityscapes"]
_CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
"""The evaluated classes of Cityscapes by the numbers in `*_gtFine_labelIds.png`."""


def _from_ade20k(values: Tensor) -> Tensor:
    """0 is "other", and the list begins at 1."""
    return torch.where(values == 0, VOID, values - 1)


def _from_cityscapes(values: Tensor) -> Tensor:
    table = torch.full((256,), VOID)
    table[list(_CITYSCAPES)] = torch.arange(len(_CITYSCAPES))
    return table[values.clamp(0, 255)]


_TRANSLATIONS: Mapping[Layout, Callable[[Tensor], Tensor]] = {
    "plain": lambda values: values,
    "ade20k": _from_ade20k,
    "coco-stuff": lambda values: values,
    "cityscapes": _from_cityscapes,
}
"""From the values of a layout's PNG files to labels."""


@dataclass(kw_only=True, slots=True)
class Masks:
    """The labels of some photos."""

    classes: ClassList
    """What they mean."""
    files: Mapping[str, Path]
    """The label picture of each photo, by the photo's name without suffix."""
    load: Callable[[str], Tensor]
    """The labels (H, W) of a photo by that name."""

    def get(self, photo: Photo, sides: Sequence[int]) -> Tensor:
        """Labels, uint8 (H, W), of a photo of `sides` (H, W).

        Raises:
            DataError: another size, a label outside the list, or a file that cannot be read.
        """
        name = _name(photo)
        labels = self.load(name)
        if tuple(labels.shape) != tuple(sides):
            raise DataError(
                f"{self.files[name]} has {labels.shape[1]}×{labels.shape[0]} pixels, its photo {photo.path} "
                f"{sides[1]}×{sides[0]}; give labels of the photo's own size."
            )
        check_labels(labels, len(self.classes), str(self.files[name]))
        return labels.to(torch.uint8)

    def check(self, photos: Sequence[Photo]) -> None:
        """Refuse photos without labels, and labels that say nothing at all.

        Raises:
            DataError: a photo has no label picture, or the first ones are void everywhere.
        """
        lonely = [str(photo.path) for photo in photos if _name(photo) not in self.files]
        if lonely:
            raise DataError(
                f"{len(lonely)} of {len(photos)} photos have no labels, such as {lonely[0]}; expected a label picture "
                "of the same name for each. `python -m trainer.segsr.label` makes some."
            )
        shown = photos[:8]
        if all(bool((self.load(_name(photo)) == VOID).all()) for photo in shown):
            raise DataError(
                f"The labels of the first {len(shown)} photos are void everywhere; give the layout that they have "
                "(--layout)."
            )

    def fingerprint(self) -> str:
        """A short text that differs when classes or the names of the files do."""
        names = (name.encode() for name in sorted(self.files))
        return digest([repr(self.classes).encode(), *names])


def _name(photo: Photo) -> str:
    return photo.path.stem.removesuffix("_leftImg8bit")


def read_masks(source: Path, *, layout: Layout = "plain", classes: Path | None = None) -> Masks:
    """The labels that a source has.

    Args:
        source: a folder of label pictures (searched with the folders in it), or a COCO panoptic file whose PNG files
            lie in the folder of its name.
        layout: of the folder: `plain` (labels from 0 on, 255 void), `ade20k` (0 void, labels from 1 on), `coco-stuff`
            (as plain), `cityscapes` (`*_gtFine_labelIds.png`).
        classes: list of the classes; by default `classes.json` in the folder or above it.

    Raises:
        DataError: there are no labels, or nothing says what they mean.
    """
    if source.suffix == ".json":
        return _from_panoptic(read_panoptic(source))
    if not source.is_dir():
        raise DataError(f"{source} does not exist; expected a folder of label pictures or a COCO panoptic .json file.")
    ending = "_gtFine_labelIds" if layout == "cityscapes" else ""
    files = {
        path.stem.removesuffix(ending): path for path in sorted(source.rglob("*.png")) if path.stem.endswith(ending)
    }
    if not files:
        raise DataError(f"{source} holds no label pictures (*{ending}.png).")
    translate = _TRANSLATIONS[layout]
    return Masks(
        classes=_classes_of(source, layout, classes),
        files=files,
        load=lambda name: translate(read_labels(files[name])),
    )


def _classes_of(source: Path, layout: Layout, given: Path | None) -> ClassList:
    if given is not None:
        return read_classes(given)
    beside = next((folder / FILE for folder in (source, source.parent) if (folder / FILE).is_file()), None)
    if beside is not None:
        return read_classes(beside)
    if layout == "cityscapes":
        return class_list(list(_CITYSCAPES.values()))
    raise DataError(
        f"Nothing says what the labels in {source} mean: put a {FILE} there, or give --classes, a text with the name "
        "of each class on a line of its own."
    )


def _from_panoptic(found: PanopticAnnotations) -> Masks:
    """Class maps of panoptic segments, numbered in the order of the categories' ids."""
    ids = sorted(found.categories)

    def load(name: str) -> Tensor:
        classes = found.read(name).classes()
        places = np.searchsorted(ids, classes).clip(0, len(ids) - 1)
        known = np.asarray(ids)[places] == classes
        return torch.from_numpy(np.where(known, places, VOID))

    return Masks(classes=class_list([found.categories[number] for number in ids]), files=found.files, load=load)
