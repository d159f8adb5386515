"""A wished size of the result in words ("4k", "1080p", "12MP", "1920x1080 crop"), and what it means for a photo."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from ..errors import SettingsError
from .sizes import Size, final_size

_LONGER = {"4k": 3840, "8k": 7680}
_FORMS = (
    "a longer side (3840, 4k, 8k), a shorter side (1080p), megapixels (12MP), or a size to fit in or to fill "
    "(1920x1080, 1920x1080 crop)"
)
_NUMBER = r"(\d+(?:\.\d+)?)"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetSize:
    """What size a result should have, whatever the photo's own."""

    kind: Literal["longer", "shorter", "megapixels", "fit", "crop"]
    """Which length is given; "fit" keeps the whole photo inside a size, "crop" fills it and cuts off what is over."""
    width: float
    """Pixels of the side, or of the width; millions of pixels."""
    height: float = 0.0
    """Pixels of the height, for "fit" and "crop"."""

    @classmethod
    def parse(cls, text: str) -> TargetSize:
        """The target that `text` names: a number is the longer side in pixels, other forms as in the module's text.

        Raises:
            SettingsError: no such form, or nothing in it.
        """
        words = text.lower().replace("×", "x").strip()
        found = cls._parse(words)
        if found is None or not found.width or (found.kind in ("fit", "crop") and not found.height):
            raise SettingsError(f"{text!r} is no size: expected {_FORMS}.")
        return found

    @classmethod
    def _parse(cls, words: str) -> TargetSize | None:
        if words in _LONGER:
            return cls(kind="longer", width=_LONGER[words])
        if side := re.fullmatch(r"(\d+)(p?)", words):
            return cls(kind="shorter" if side[2] else "longer", width=int(side[1]))
        if millions := re.fullmatch(rf"{_NUMBER} ?mp", words):
            return cls(kind="megapixels", width=float(millions[1]))
        if box := re.fullmatch(r"(\d+) ?x ?(\d+)(?:[ :](fit|crop))?", words):
            kind: Literal["fit", "crop"] = "crop" if box[3] == "crop" else "fit"
            return cls(kind=kind, width=int(box[1]), height=int(box[2]))
        return None

    def scale_for(self, photo: Size) -> float:
        """Size of the result over that of a photo of (width, height) pixels."""
        if self.kind == "longer":
            return self.width / max(photo)
        if self.kind == "shorter":
            return self.width / min(photo)
        if self.kind == "megapixels":
            return math.sqrt(self.width * 1e6 / (photo[0] * photo[1]))
        ratios = (self.width / photo[0], self.height / photo[1])
        return max(ratios) if self.kind == "crop" else min(ratios)

    def result_size(self, photo: Size) -> Size:
        """(width, height) of the result of a photo."""
        whole = final_size(photo, self.scale_for(photo))
        return (int(self.width), int(self.height)) if self.kind == "crop" else whole

    def box(self, whole: Size) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the part of a scaled photo of size `whole` that is kept: its middle."""
        if self.kind != "crop":
            return (0, 0, *whole)
        left, top = (int(whole[0] - self.width) // 2, int(whole[1] - self.height) // 2)
        return left, top, left + int(self.width), top + int(self.height)

    def cut(self, picture: Image.Image) -> Image.Image:
        """What is kept of a scaled photo."""
        box = self.box(picture.size)
        return picture if box == (0, 0, *picture.size) else picture.crop(box)
