"""Reading a photo file: what it holds is brought to upright 8-bit RGB, what goes beside it is remembered.

Sixteen bits a channel are remembered, too: the networks see 8, the result's colours come from all.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from ..errors import ImageError
from . import sixteen
from .metadata import Metadata, read_metadata
from .opening import open_picture
from .sizes import Size, as_rgb

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(kw_only=True, slots=True)
class InputPhoto:
    """A photo as the method takes it."""

    rgb: Image.Image
    """Upright 8-bit RGB."""
    alpha: Image.Image | None = None
    """Transparency of the same size, mode L."""
    grey: bool = False
    """The file was without colour, so its result should be, too."""
    icc: bytes | None = None
    """The ICC profile that the RGB (or grey) values belong to."""
    levels: sixteen.Levels | None = None
    """The same colours, (H, W, 1 or 3), where the file has 16 bits a channel."""
    alpha_levels: sixteen.Levels | None = None
    """The same transparency, (H, W)."""
    metadata: Metadata = field(default_factory=Metadata)
    """What the file says beside the pixels."""
    notes: list[str] = field(default_factory=list)
    """What a person should know about the conversion."""

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return self.rgb.size

    def like(self, result: Image.Image) -> Image.Image:
        """`result` (RGB) with this photo's transparency, enlarged beside it, and without colour if it had none."""
        picture = result.convert("L") if self.grey else result
        if self.alpha is None:
            return picture
        picture = picture.convert("LA" if self.grey else "RGBA")
        picture.putalpha(self.alpha.resize(result.size, Image.Resampling.BICUBIC))
        return picture

    def sixteen_bits(self) -> sixteen.Levels:
        """The colours as levels (H, W, 1 or 3), those of 8 bits where the file has no more."""
        if self.levels is not None:
            return self.levels
        values = np.asarray(self.rgb).astype(np.uint16) * np.uint16(sixteen.PER_LEVEL)
        return values[..., :1] if self.grey else values

    def like_sixteen(self, result_HW3: sixteen.Levels) -> sixteen.Levels:
        """`like` for a result of 16 bits: (H, W, C)."""
        alpha = self.alpha_levels
        if alpha is None and self.alpha is not None:
            alpha = np.asarray(self.alpha).astype(np.uint16) * np.uint16(sixteen.PER_LEVEL)
        return sixteen.like(result_HW3, grey=self.grey, alpha_HW=alpha)


def read_photo(path: str | os.PathLike[str], *, frame: int | None = None) -> InputPhoto:
    """Read one picture.

    Args:
        path: a file of one of `opening.FORMATS_READ`.
        frame: which picture (from 0) of an animation or of a file with several pages; None refuses such files.

    Raises:
        ImageError: missing, empty, no picture, truncated, animated, or of a kind that 8-bit RGB cannot stand for.
        ResourceError: too large to be decoded in the memory that is left.
    """
    source = Path(path)
    with open_picture(source) as image:
        _choose_frame(image, source, frame)
        return _read(image, source)


def read_frames(path: str | os.PathLike[str]) -> Iterator[InputPhoto]:
    """Every picture of an animation or of a file with several pages, in order; of another file its one picture.

    Raises:
        ImageError, ResourceError: as `read_photo`.
    """
    source = Path(path)
    with open_picture(source) as image:
        for frame in range(frame_count(image)):
            image.seek(frame)
            yield _read(image, source)


def frame_count(image: Image.Image) -> int:
    """How many pictures an open file shows; the previews that cameras put behind a photo (MPO) are none."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def read_timing(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """How an animation plays, as Pillow's `save` takes it, and how many frames it has.

    `duration` of every frame (ms) and `loop`, where the file gives them.

    Raises:
        ImageError, ResourceError: as `read_photo`.
    """
    timing: dict[str, Any] = {}
    with open_picture(path) as image:
        count, durations = frame_count(image), []
        for frame in range(count):
            image.seek(frame)
            image.load()
            durations.append(round(image.info.get("duration", 0)))
        if any(durations):
            timing["duration"] = durations
        if "loop" in image.info:
            timing["loop"] = image.info["loop"]
    return timing, count


def _read(image: Image.Image, source: Path) -> InputPhoto:
    """The picture that an open file stands at."""
    stored = _stored_mode(image)
    image.load()
    photo = _as_photo(image, source)
    photo.grey |= stored.startswith("LA")  # 16-bit grey with alpha is decoded to RGBA
    if ";16" in stored:
        photo.notes.append("16 bits a channel were read; the method works on 8")
        _read_sixteen(photo, image, stored, source)
    photo.metadata = read_metadata(image)  # last: it forgets the orientation
    return photo


def _read_sixteen(photo: InputPhoto, image: Image.Image, stored: str, source: Path) -> None:
    """All bits of a picture that was read at 8."""
    if image.mode.startswith("I"):
        photo.levels = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)[..., None]
    elif sixteen.is_sixteen(stored):
        with open_picture(source) as again:
            if image.tell():
                again.seek(image.tell())
            sixteen.other_bytes(again)
            again.load()
            levels = sixteen.join(image, again, stored)
        photo.levels = levels[..., : 1 if photo.grey else 3]
        photo.alpha_levels = levels[..., -1] if levels.shape[2] in (2, 4) else None


def upright_size(image: Image.Image) -> Size:
    """(width, height) that an open picture will have upright; its pixels are not read."""
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if turned else (width, height)


def _choose_frame(image: Image.Image, source: Path, frame: int | None) -> None:
    count = getattr(image, "n_frames", 1)
    if frame is not None:
        if not 0 <= frame < count:
            raise ImageError(f"{source} has no frame {frame}: expected 0 to {count - 1}.")
        image.seek(frame)
    elif frame_count(image) > 1:
        raise ImageError(f"{source} is animated or has several pages ({count}): choose one with --frame, from 0.")


def _stored_mode(image: Image.Image) -> str:
    """How the file stores a pixel ("RGB;16B"), which `image.mode` does not tell after decoding; "" where unknown."""
    for tile in getattr(image, "tile", ()):
        stored = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
        if isinstance(stored, str):
            return stored
    return ""


def _as_photo(image: Image.Image, source: Path) -> InputPhoto:
    _check_range(image, source)
    icc = image.info.get("icc_profile")
    grey = image.mode in _GREY_MODES
    upright = ImageOps.exif_transpose(image)
    if image.mode == "CMYK":
        rgb, note = _from_cmyk(upright, icc)
        return InputPhoto(rgb=rgb, notes=[note])
    alpha = upright.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    keeps_values = grey or image.mode in ("RGB", "RGBA", "P")
    return InputPhoto(rgb=as_rgb(upright), alpha=alpha, grey=grey, icc=icc if keeps_values else None)


def _check_range(image: Image.Image, source: Path) -> None:
    if image.mode == "F":
        raise ImageError(f"{source} holds floating-point values: expected 8 or 16 bits a channel. Convert it first.")
    if image.mode == "I":
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if low < 0 or high > 65535:
            raise ImageError(f"{source} holds values from {low} to {high}: expected 16 bits a channel (0 to 65535).")


def _from_cmyk(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, str]:
    """RGB and how it was got: through the file's own profile, or by the plain formula without one."""
    if icc:
        try:
            profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
            if converted is not None:
                return converted, "CMYK was converted to sRGB by the file's profile"
        except (ImageCms.PyCMSError, OSError):
            return image.convert("RGB"), "CMYK was converted to RGB; the file's colour profile is damaged"
    return image.convert("RGB"), "CMYK was converted to RGB without a colour profile"
