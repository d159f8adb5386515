"""Writing a result: which formats there are, what each can hold, and the file itself, whole or not at all."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ImageError, ResourceError
from ..runtime.files import whole_file
from ..runtime.memory import require_disk
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
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that Pillow saves the format with."""


_JPEG = Format(name="JPEG", longest_side=65535, alpha=False, options={"quality": 95, "subsampling": 0})
_TIFF = Format(name="TIFF", most_bytes=4e9, options={"compression": "tiff_adobe_deflate"})
FORMATS: Mapping[str, Format] = {
    ".png": Format(name="PNG"),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": Format(name="WEBP", longest_side=16383, options={"quality": 95}),
    ".avif": Format(name="AVIF", longest_side=65536, options={"quality": 90}),
    ".tif": _TIFF,
    ".tiff": _TIFF,
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


def check_fits(path: Path, size: Size, *, alpha: bool) -> None:
    """Find out before the work whether the format of `path` holds a result of `size`, with or without transparency.

    Raises:
        ImageError: it does not. ResourceError: the disk certainly has no room for it.
    """
    kind = format_of(path)
    if alpha and not kind.alpha:
        raise ImageError(f"{path}: {kind.name} cannot keep the photo's transparency; choose .png, .webp or .tif.")
    if max(size) > kind.longest_side:
        raise ImageError(
            f"{path}: the result has {size[0]}×{size[1]} pixels, {kind.name} holds up to {kind.longest_side:g} a side; "
            "choose .png or .tif."
        )
    pixels = size[0] * size[1] * (4 if alpha else 3)
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
    kind = format_of(Path(path))
    options = {**kind.options, **({"icc_profile": icc} if icc else {})}
    if quality is not None and "quality" in options:
        options["quality"] = quality
    if metadata is not None:
        options |= metadata.options(kind.name, picture.size)
    # In memory first: of a disk that fills up, Pillow's encoders only say "encoder error -2".
    encoded = io.BytesIO()
    picture.save(encoded, kind.name, **options)
    with whole_file(path) as handle:
        handle.write(encoded.getbuffer())
