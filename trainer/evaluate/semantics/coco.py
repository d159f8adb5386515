"""COCO's annotation files, as far as they are read here: boxes, masks and panoptic segments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from seesr_core.errors import DataError
from seesr_core.formats.schema import MalformedError, Number, Within, read, read_json

File = TypeVar("File")
Id: TypeAlias = Annotated[int, Within(0, 1 << 52)]
Side: TypeAlias = Annotated[int, Within(1, 1 << 15)]
BOXES = "COCO annotations (JSON with images, annotations with bbox, categories)"


@dataclass(frozen=True, slots=True)
class Picture:
    """An annotated picture."""

    id: Id
    file_name: Annotated[str, Within(1, 1000)]
    width: Side
    height: Side

    @property
    def name(self) -> str:
        """Its file name without suffix."""
        return Path(self.file_name).stem

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height


@dataclass(frozen=True, slots=True)
class Category:
    """What can be seen."""

    id: Id
    name: str
    isthing: int | bool = 1


@dataclass(frozen=True, slots=True)
class Box:
    """A true box: left, top, width, height."""

    image_id: Id
    category_id: Id
    bbox: tuple[Number, Number, Number, Number]
    iscrowd: int | bool = 0


@dataclass(frozen=True, slots=True)
class Instances:
    """A file of boxes."""

    images: list[Picture]
    annotations: list[Box]
    categories: list[Category]


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A mask as COCO packs it."""

    size: tuple[Side, Side]
    counts: str | list[Annotated[int, Within(0, 1 << 30)]]


@dataclass(frozen=True, slots=True)
class Mask:
    """A true mask: polygons, or run lengths."""

    id: Id
    image_id: Id
    category_id: Id
    area: Number
    segmentation: list[Annotated[list[Annotated[float, Within(-1e5, 1e5)]], Within(6, 1 << 20)]] | RunLengths
    iscrowd: int | bool = 0


@dataclass(frozen=True, slots=True)
class Masks:
    """A file of masks."""

    images: list[Picture]
    annotations: list[Mask]
    categories: list[Category]


@dataclass(frozen=True, slots=True)
class Part:
    """A segment of a panoptic picture."""

    id: Annotated[int, Within(0, (1 << 24) - 1)]
    category_id: Id
    iscrowd: int | bool = 0


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of one picture."""

    file_name: Annotated[str, Within(1, 1000)]
    segments_info: list[Part]


@dataclass(frozen=True, slots=True)
class Panoptic:
    """A panoptic file."""

    annotations: list[Segments]
    categories: list[Category]


def read_file(kind: type[File], path: Path, what: str) -> tuple[File, Any]:
    """A file as `kind`, and as the plain JSON that it is.

    Raises:
        DataError: it is something else; `what` says what it should be.
    """
    try:
        data = read_json(path)
        found: File = read(kind, data)
        return found, data
    except (OSError, MalformedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} should be {what}, but cannot be read so ({reason}).") from error


Objects = TypeVar("Objects", bound=Instances | Masks)


def read_objects(kind: type[Objects], what: str, path: Path) -> tuple[Objects, Any]:
    """A file of boxes or masks, each of which belongs to a picture of the file, and the plain JSON that it is.

    Raises:
        DataError: it is something else; `what` says what it should be.
    """
    file, data = read_file(kind, path, what)
    listed = {image.id for image in file.images}
    for entry in file.annotations:
        if entry.image_id not in listed:
            raise DataError(f"{path} has a box of the picture {entry.image_id}, which it does not list; correct it.")
    return file, data
