"""Writing a result: which formats there are, what each can hold, and the file itself, whole or not at all."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ImageError, ResourceError
from ..runtime.files import whole_file
from ..runtime.memory import require_disk
from . import sixteen
from .metadata import Metadata
from .sizes import Size

_SMALLEST_SHARE = 0.02
"""A photo's file is hardly ever smaller than this share of its pixels' bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A picture format that results are written in."""

    name: str
    """Pillow's name of the format."""
    longest_side: float = math.inf
    """Most pixels that a side may have in the format."""
    most_bytes: float = math.inf
    """Most bytes of pixels that the format holds."""
    alpha: bool = True
    """Whether the format keeps transparency."""
    sixteen: bool = False
    """Whether the format holds 16 bits a channel."""
    frames: bool = True
    """Whether a file of the format may hold several pictures."""
    stills: bool = True
    """Whether a single photo is written in it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that Pillow saves the format with."""


_JPEG = Format(name="JPEG", longest_side=65535, alpha=False, frames=False, options={"quality": 95, "subsampling": 0})
_TIFF = Format(name="TIFF", most_bytes=4e9, sixteen=True, options={"compression": "tiff_adobe_deflate"})
FORMATS: Mapping[str, Format] = {
    ".png": Format(name="PNG", sixteen=True),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": Format(name="WEBP", longest_side=16383, options={"quality": 95}),
    ".avif": Format(name="AVIF", longest_side=65536, options={"quality": 90}),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".gif": Format(name="GIF", longest_side=65535, stills=False),
}
"""File formats that results are written in, by suffix in lower case."""


def format_of(path: Path) -> Format:
    """The format that the suffix of `path` asks for.

    Raises:
        ImageError: no known suffix.
    """
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise ImageError(
            f"{path} has {'the unknown suffix ' + path.suffix if path.suffix else 'no suffix'}: "
            f"expected one of {', '.join(FORMATS)}."
        )
    Image.init()
    if found.name not in Image.SAVE:
        raise ImageError(f"{path}: this Pillow writes no {found.name}; choose .png, or install a newer Pillow.")
    return found


def check_target(path: Path) -> None:
    """Find out before the work whether a file can be made at `path`; missing folders are made.

    Raises:
        ImageError: no known suffix.
        ResourceError: the folder cannot be written to, or `path` is a folder.
    """
    format_of(path)
    check_writable(path)


def check_writable(path: Path) -> None:
    """The same for a file of any kind.

    Raises:
        ResourceError: the folder cannot be written to, or `path` is a folder.
    """
    if path.is_dir():
        raise ResourceError(f"{path} is a folder: name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ResourceError(
            f"Cannot write into {path.parent}: {error.strerror or error}. Choose another folder."
        ) from error


def check_fits(path: Path, size: Size, *, alpha: bool, depth: int = 8, frames: int = 1) -> None:
    """Find out before the work whether the format of `path` holds a result of `size`, with or without transparency.

    Args:
        path: the file.
        size: (width, height) of the result.
        alpha: whether it has transparency.
        depth: its bits a channel.
        frames: how many pictures there are.

    Raises:
        ImageError: it does not. ResourceError: the disk certainly has no room for it.
    """
    kind = format_of(path)
    if alpha and not kind.alpha:
        raise ImageError(f"{path}: {kind.name} cannot keep the photo's transparency; choose .png, .webp or .tif.")
    if frames == 1 and not kind.stills:
        raise ImageError(f"{path}: {kind.name} holds 256 colours, too few for a photo; choose .png, .webp or .tif.")
    if depth == 16 and not kind.sixteen:
        raise ImageError(f"{path}: {kind.name} holds 8 bits a channel; choose .png or .tif, or --depth 8.")
    if frames > 1 and not kind.frames:
        raise ImageError(f"{path}: {kind.name} holds one picture; choose .gif, .png, .webp, .avif or .tif.")
    if max(size) > kind.longest_side:
        raise ImageError(
            f"{path}: the result has {size[0]}×{size[1]} pixels, {kind.name} holds up to {kind.longest_side:g} a side; "
            "choose .png or .tif."
        )
    pixels = frames * size[0] * size[1] * (4 if alpha else 3) * (depth // 8)
    if pixels > kind.most_bytes:
        raise ImageError(
            f"{path}: the result has {pixels / 1e9:.1f} GB of pixels, {kind.name} holds up to "
            f"{kind.most_bytes / 1e9:g} GB; choose .png."
        )
    require_disk(path.parent, pixels * _SMALLEST_SHARE, f"{path} ({size[0]}×{size[1]} pixels)")


def save_picture(
    path: str | os.PathLike[str],
    picture: Image.Image,
    *,
    icc: bytes | None = None,
    metadata: Metadata | None = None,
    quality: int | None = None,
) -> None:
    """Write `picture` in the format of the suffix, whole or not at all.

    Args:
        path: the file.
        picture: 8 bits a channel.
        icc: the profile that its values belong to.
        metadata: what goes beside it, as far as the format holds it.
        quality: 1 to 100 for formats that lose something; None: nearly nothing.

    Raises:
        ImageError: no known suffix. ResourceError: the disk is full or cannot be written to.
    """
    _save(Path(path), [picture], {"icc_profile": icc} if icc else {}, metadata, quality)


def save_frames(
    path: str | os.PathLike[str],
    pictures: Sequence[Image.Image],
    *,
    timing: Mapping[str, Any],
    icc: bytes | None = None,
    metadata: Metadata | None = None,
    quality: int | None = None,
) -> None:
    """Write pictures of one size as an animation, or as the pages of a TIFF; arguments and errors as `save_picture`.

    `timing`: `duration` (ms, one or one for each) and `loop`, as Pillow's `save` takes them; a TIFF has none.
    """
    rest = {"save_all": True, "append_images": pictures[1:]} if len(pictures) > 1 else {}
    shown = {} if format_of(Path(path)).name == "TIFF" else dict(timing)
    _save(Path(path), pictures, {**({"icc_profile": icc} if icc else {}), **rest, **shown}, metadata, quality)


def of_one_mode(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures in the mode that holds all of theirs."""
    modes = {picture.mode for picture in pictures}
    if len(modes) == 1:
        return list(pictures)
    mode = "RGBA" if modes & {"RGBA", "LA"} else "RGB"
    return [picture.convert(mode) for picture in pictures]


def _save(
    path: Path,
    pictures: Sequence[Image.Image],
    more: Mapping[str, Any],
    metadata: Metadata | None,
    quality: int | None,
) -> None:
    kind = format_of(path)
    options = {**kind.options, **more}
    if quality is not None and "quality" in options:
        options["quality"] = quality
    if metadata is not None:
        options |= metadata.options(kind.name, pictures[0].size)
    # In memory first: of a disk that fills up, Pillow's encoders only say "encoder error -2".
    encoded = io.BytesIO()
    pictures[0].save(encoded, kind.name, **options)
    with whole_file(path) as handle:
        handle.write(encoded.getbuffer())


def save_sixteen(
    path: str | os.PathLike[str],
    levels: sixteen.Levels,
    *,
    icc: bytes | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Write levels (H, W, 1 to 4) with 16 bits a channel, whole or not at all; arguments and errors as `save_picture`.

    Raises:
        ImageError: the suffix is not of a format that holds them.
    """
    check_fits(Path(path), (levels.shape[1], levels.shape[0]), alpha=False, depth=16)
    encode = {"PNG": sixteen.encode_png, "TIFF": sixteen.encode_tiff}[format_of(Path(path)).name]
    encoded = encode(levels, icc=icc, metadata=metadata)
    with whole_file(path) as handle:
        handle.write(encoded)
