"""Contact sheets: the same part of several versions of a picture side by side, for the eye."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from seesr_core.pictures.writing import save_picture

CELL = 512
_HEADING, _GAP = 32, 4
_TITLES = 16


def contact_sheet(rows: Iterable[tuple[str, Mapping[str, Image.Image]]], *, cell: int = CELL) -> Image.Image:
    """One row a picture with its name above, one titled column a version.

    Cells show the centre of each version at its own pixels, never resized, cut to `cell` pixels a side.

    Args:
        rows: name and versions of each picture, all rows with the same titles in the same order.
        cell: longest side of a cell in pixels.
    """
    strips = [_strip(name, versions, cell) for name, versions in rows]
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(name: str, versions: Mapping[str, Image.Image], cell: int) -> Image.Image:
    cells = [_centre(picture, cell) for picture in versions.values()]
    width = sum(picture.width + _GAP for picture in cells)
    strip = Image.new("RGB", (width, max(picture.height for picture in cells) + _HEADING + _GAP), "white")
    draw, left = ImageDraw.Draw(strip), 0
    draw.text((2, 0), name, fill="black")
    for title, picture in zip(versions, cells, strict=True):
        strip.paste(picture, (left, _HEADING))
        draw.text((left + 2, _TITLES), title, fill="black")
        left += picture.width + _GAP
    return strip


def _centre(picture: Image.Image, cell: int) -> Image.Image:
    width, height = (min(side, cell) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def write_sheet(path: Path, rows: Sequence[tuple[str, Mapping[str, Image.Image]]], *, cell: int = CELL) -> None:
    """Write `contact_sheet` in the format of the suffix.

    Raises:
        ImageError: unknown suffix. ResourceError: it cannot be written.
    """
    save_picture(path, contact_sheet(rows, cell=cell))
