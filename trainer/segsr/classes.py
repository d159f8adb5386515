"""What labels mean, on disk: `classes.json` with names and colours, and label pictures of 8 bits."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError, ImageError, SettingsError
from seesr_core.formats.schema import MalformedError, parse_json, read
from seesr_core.pictures.opening import open_picture
from seesr_core.pictures.writing import save_picture
from seesr_core.runtime.files import atomic_write, read_text
from seesr_core.segsr.model import ClassList, Colour, Names

FILE = "classes.json"
"""Name of the list in a folder of label pictures, or in the one above."""


@dataclass(frozen=True, slots=True)
class _File:
    """A list as JSON."""

    classes: Names
    palette: list[Colour] | None = None


def colours(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ from each other, for lists without a palette."""
    shades = (
        colorsys.hsv_to_rgb(i * 0.618034 % 1.0, (0.55, 0.85)[i % 2], (0.95, 0.7)[i // 2 % 2]) for i in range(count)
    )
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in shades]


def class_list(names: Sequence[str], palette: Sequence[Colour] | None = None) -> ClassList:
    """A list with colours."""
    return ClassList(names=list(names), palette=list(palette or colours(len(names))))


def read_classes(path: Path) -> ClassList:
    """A list of classes: `classes.json`, or a text with one name a line in the order of the labels.

    Raises:
        DataError: it cannot be read, or is no such list.
    """
    try:
        text = read_text(path, 1 << 20)
        if path.suffix == ".json":
            found = read(_File, parse_json(text))
        else:
            found = _File(read(Names, [line.strip() for line in text.splitlines() if line.strip()]))
        return class_list(found.classes, found.palette)
    except (OSError, MalformedError, SettingsError) as error:
        raise DataError(
            f"{path} should list the classes, as JSON with `classes` (and maybe `palette`) or one name a line "
            f"({error})."
        ) from error


def write_classes(path: Path, names: Sequence[str], palette: Sequence[Colour] | None = None) -> None:
    """Write `classes.json`."""
    classes = class_list(names, palette)
    with atomic_write(path) as temporary:
        text = json.dumps({"classes": classes.names, "palette": classes.palette}, ensure_ascii=False)
        temporary.write_text(text + "\n", "utf-8")


def read_labels(path: Path) -> Tensor:
    """A label picture as int64 (H, W), its values as they are.

    Raises:
        DataError: it cannot be read, or has colours and so no labels.
    """
    try:
        with open_picture(path) as picture:
            if picture.mode not in ("L", "P", "I", "I;16", "1"):
                raise DataError(
                    f"{path} is a colour picture ({picture.mode}); expected a label a pixel, as a grey or palette PNG."
                )
            return torch.from_numpy(np.array(picture).astype(np.int64))
    except ImageError as error:
        raise DataError(f"{path} cannot be read as a label picture ({error}).") from error


def write_labels(path: Path, labels_HW: Tensor) -> None:
    """Write a label picture of 8 bits."""
    save_picture(path, Image.fromarray(labels_HW.to(torch.uint8).cpu().numpy()))
