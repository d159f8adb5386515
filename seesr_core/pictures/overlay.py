"""Pictures that show what acts where: regions of tags in colours with their names, tiles with their tags."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GOLDEN = 0.618034
_OPACITY = 0.55
_SHOWN = 0.5
"""Regions are coloured from this value of their map on."""
_LEAST_SIDE = 512

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]


def colour(number: int) -> Colour:
    """A colour for a number; neighbours are far apart on the colour circle."""
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1.0, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_regions(photo: Image.Image, maps_NHW: Tensor, names: Sequence[str]) -> Image.Image:
    """The photo with each tag's region tinted, strongest where its map is, and its name at the map's peak.

    Args:
        photo: RGB; small ones are enlarged so that names can be read.
        maps_NHW: values in [0, 1] at the photo's size.
        names: one for each map, without signs that Pillow's font lacks.
    """
    tinted = np.asarray(photo.convert("RGB"), dtype=np.float32)
    maps = maps_NHW.float().cpu().numpy()
    for number, own in enumerate(maps):
        share = _OPACITY * np.clip((own - _SHOWN) / (1 - _SHOWN), 0, 1)[..., None]
        tinted = tinted * (1 - share) + np.asarray(colour(number), dtype=np.float32) * share
    picture, scale = _enlarged(Image.fromarray(tinted.round().astype(np.uint8)))
    places = [_peak(own, scale) for own in maps]
    for number, (name, place) in enumerate(zip(names, _apart(places, picture), strict=True)):
        _write(picture, name, place, colour(number), _font(picture))
    return picture


def draw_tiles(picture: Image.Image, boxes: Sequence[Box], texts: Sequence[str]) -> Image.Image:
    """The picture with a frame for each tile, drawn where it is nearer than its neighbours, and its words in the frame.

    Args:
        picture: RGB.
        boxes: left, top, right, bottom of each tile in pixels; tiles overlap their neighbours.
        texts: one for each tile.
    """
    shown, scale = _enlarged(picture.convert("RGB"))
    draw, font = ImageDraw.Draw(shown), _font(shown, 60)
    for number, (box, text) in enumerate(zip(_parted(boxes), texts, strict=True)):
        left, top, right, bottom = (round(side * scale) for side in box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour(number), width=3)
        across = max(8, int((right - left - 16) / (0.55 * font.size)))
        lines = textwrap.wrap(text, across)[: max(1, int((bottom - top - 16) / (1.3 * font.size)))]
        _write(shown, "\n".join(lines), (left + 8, top + 8), colour(number), font)
    return shown


def _parted(boxes: Sequence[Box]) -> list[Box]:
    """The boxes of a grid without what they share: each ends in the middle of an overlap."""
    columns = _edges(sorted({(left, right) for left, _, right, _ in boxes}))
    rows = _edges(sorted({(top, bottom) for _, top, _, bottom in boxes}))
    parted = ((columns[left, right], rows[top, bottom]) for left, top, right, bottom in boxes)
    return [(left, top, right, bottom) for (left, right), (top, bottom) in parted]


def _edges(spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    middles = [(end + start) // 2 for (_, end), (start, _) in pairwise(spans)]
    return dict(zip(spans, pairwise([spans[0][0], *middles, spans[-1][1]]), strict=True))


def _enlarged(picture: Image.Image) -> tuple[Image.Image, float]:
    scale = max(1.0, _LEAST_SIDE / max(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    return (picture.copy() if scale == 1 else picture.resize(size, Image.Resampling.BICUBIC)), scale


def _peak(map_HW: NDArray[np.float32], scale: float) -> tuple[int, int]:
    row, column = divmod(int(map_HW.argmax()), map_HW.shape[1])
    return int(column * scale), int(row * scale)


def _apart(places: Sequence[tuple[int, int]], picture: Image.Image) -> list[tuple[int, int]]:
    """Places from which names can be read: inside the picture, and not two on one line at one height."""
    height = int(1.6 * _font(picture).size)
    taken: list[tuple[int, int]] = []
    for left, top in places:
        place = (min(left, int(0.75 * picture.width)), min(top, picture.height - height))
        for _ in range(picture.height // height):
            if all(abs(place[1] - other) >= height for _, other in taken):
                break
            place = (place[0], (place[1] + height) % (picture.height - height + 1))
        taken.append(place)
    return taken


def _font(picture: Image.Image, part: int = 36) -> ImageFont.FreeTypeFont:
    """Pillow's own, its height that part of the picture's longer side."""
    font = ImageFont.load_default(max(12, round(max(picture.size) / part)))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _write(
    picture: Image.Image, text: str, place: tuple[int, int], background: Colour, font: ImageFont.FreeTypeFont
) -> None:
    """Black words on a plate of the region's colour."""
    if not text:
        return
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.multiline_textbbox(place, text, font=font)
    draw.rectangle((left - 3, top - 3, right + 3, bottom + 3), fill=background)
    draw.multiline_text(place, text, fill="black", font=font)
