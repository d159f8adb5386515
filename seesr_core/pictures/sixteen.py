"""Sixteen bits a channel, which Pillow holds for grey alone: reading, resizing, finishing, and files.

Levels are uint16 arrays (H, W, C) of 0 … 65535: grey (C = 1) or RGB (C = 3), with alpha as one channel more.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from ..method.color import ColorFix, color_fix
from .metadata import Metadata
from .sizes import Size, content_box, final_size, prepare_size

Levels = NDArray[np.uint16]

WHITE = 65535
PER_LEVEL = 257
"""Sixteen-bit levels to one of 8 bits."""
_GREY = (0.299, 0.587, 0.114)
"""ITU-R 601, as Pillow's own grey."""
_NATIVE = "B" if sys.byteorder == "big" else "L"
_OTHER = {"B": "L", "L": "B"}
_PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_UP = b"\2"
"""PNG's filter of rows: differences to the row above."""


def is_sixteen(stored: str) -> bool:
    """Whether a file whose decoder says `stored` of a pixel has 16 bits a channel that can be read."""
    return stored.partition(";")[0] in ("RGB", "RGBA", "LA") and ";16" in stored


def other_bytes(image: Image.Image) -> None:
    """Make an open picture, not yet decoded, give the low byte of every channel in place of the high one.

    Pillow decodes 16 bits of colour to their high bytes by the name of the stored order; under the name of the opposite
    order it gives the others. Grey with alpha comes as four channels instead: grey high, low, alpha high, low.
    """
    tiles = getattr(image, "tile", [])
    image.tile = [tile._replace(args=_swapped(tile.args)) for tile in tiles]  # type: ignore[attr-defined]


def _swapped(arguments: Any) -> Any:
    first = arguments if isinstance(arguments, str) else arguments[0]
    mode, _, bits = first.partition(";")
    order = bits.removeprefix("16").replace("N", _NATIVE)
    name = "RGBA" if mode == "LA" else f"{mode};16{_OTHER[order]}"
    return name if isinstance(arguments, str) else (name, *arguments[1:])


def join(high: Image.Image, low: Image.Image, stored: str) -> Levels:
    """Levels, upright, of a picture decoded twice: as Pillow does, and after `other_bytes`."""
    highs, lows = (np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16) for image in (high, low))
    if stored.startswith("LA"):
        return lows[..., 0::2] * np.uint16(256) + lows[..., 1::2]
    return highs * np.uint16(256) + lows


def resize(levels_HWC: Levels, size: Size) -> NDArray[np.float32]:
    """Bicubic, as of 8 bits, to float32 (H, W, C) of 0 … 65535, clipped."""
    channels = (Image.fromarray(levels_HWC[..., c].astype(np.float32)) for c in range(levels_HWC.shape[2]))
    return _stack(_resize(channel, size) for channel in channels)


def _resize(channel: Image.Image, size: Size) -> Image.Image:
    return channel if channel.size == size else channel.resize(size, Image.Resampling.BICUBIC)


def _stack(channels: Any) -> NDArray[np.float32]:
    return np.clip(np.stack([np.asarray(channel) for channel in channels], axis=-1), 0, WHITE)


def rounded(values: NDArray[np.float32]) -> Levels:
    """The nearest levels."""
    return np.rint(values).astype(np.uint16)


def prepare(levels_HWC: Levels, *, scale: float, min_size: int) -> Tensor:
    """The upscaled photo (C, H, W) in [0, 1], float32: as `sizes.prepare` makes it of 8 bits."""
    height, width = levels_HWC.shape[:2]
    sizes = prepare_size(width, height, scale=scale, min_size=min_size)
    left, top, right, bottom = content_box(sizes.prepared, sizes.lr, scale)
    values: NDArray[Any] = levels_HWC
    for size in (sizes.enlarged, sizes.upscaled, (right - left, bottom - top)):
        values = rounded(resize(values, size))
    after = sizes.prepared[1] - bottom, sizes.prepared[0] - right
    padded = np.pad(values, [(top, after[0]), (left, after[1]), (0, 0)], mode="symmetric")
    return torch.from_numpy(padded.astype(np.float32) / WHITE).movedim(-1, 0)


def finish(decoded_3HW: Tensor, levels_HWC: Levels, *, scale: float, min_size: int, fix: ColorFix) -> Levels:
    """The finished picture (H, W, 3): colours of the photo, then exactly its size × `scale`.

    As `sizes.finish`, but nothing is cut to 8 bits: neither the decoded picture, in [0, 1], nor the photo.
    """
    height, width = levels_HWC.shape[:2]
    reference = prepare(levels_HWC, scale=scale, min_size=min_size).expand(3, -1, -1)
    left, top, right, bottom = content_box((reference.shape[-1], reference.shape[-2]), (width, height), scale)
    shown = (slice(top, bottom), slice(left, right))
    pairs = zip(decoded_3HW, reference, strict=True)
    fixed = (color_fix(a[shown][None, None], b[shown][None, None], fix)[0, 0] for a, b in pairs)
    channels = (Image.fromarray((channel.clamp(0, 1) * WHITE).float().numpy()) for channel in fixed)
    return rounded(_stack(_resize(channel, final_size((width, height), scale)) for channel in channels))


def at_eight(levels_HW3: Levels) -> Image.Image:
    """The RGB picture of 8 bits a channel that is nearest."""
    return Image.fromarray(rounded(levels_HW3 / np.float32(PER_LEVEL)).astype(np.uint8))


def like(result_HW3: Levels, *, grey: bool, alpha_HW: Levels | None) -> Levels:
    """A result without colour if the photo had none, with the photo's transparency enlarged beside it."""
    picture = rounded((result_HW3.astype(np.float32) @ np.array(_GREY, np.float32))[..., None]) if grey else result_HW3
    if alpha_HW is None:
        return picture
    alpha = rounded(resize(alpha_HW[..., None], (picture.shape[1], picture.shape[0])))
    return np.concatenate([picture, alpha], axis=-1)


def encode_png(levels_HWC: Levels, *, icc: bytes | None, metadata: Metadata | None) -> bytes:
    """A PNG of 16 bits a channel; what goes beside the pixels is written by Pillow."""
    height, width, channels = levels_HWC.shape
    beside = io.BytesIO()
    options = metadata.options("PNG", (width, height)) if metadata is not None else {}
    Image.new("L", (1, 1)).save(beside, "PNG", **options, **({"icc_profile": icc} if icc else {}))
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOURS[channels], 0, 0, 0)
    packed = {b"IHDR": header, b"IDAT": zlib.compress(_filtered(levels_HWC), 6)}
    chunks = (_chunk(kind, packed.get(kind, content)) for kind, content in _chunks(beside.getvalue()))
    return _PNG_START + b"".join(chunks)


def _filtered(levels_HWC: Levels) -> bytes:
    rows = np.frombuffer(levels_HWC.astype(">u2").tobytes(), np.uint8).reshape(len(levels_HWC), -1)
    differences = np.diff(rows, axis=0, prepend=np.zeros((1, rows.shape[1]), np.uint8))
    return b"".join(_UP + row.tobytes() for row in differences)


def _chunks(png: bytes) -> Sequence[tuple[bytes, bytes]]:
    found, at = [], len(_PNG_START)
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encode_tiff(levels_HWC: Levels, *, icc: bytes | None, metadata: Metadata | None) -> bytes:
    """A TIFF of 16 bits a channel, in one deflated strip; its directory is written by Pillow.

    Grey with alpha is written as RGB with alpha, since Pillow opens no other.
    """
    if levels_HWC.shape[2] == 2:
        levels_HWC = levels_HWC[..., (0, 0, 0, 1)]
    height, width, channels = levels_HWC.shape
    strip = zlib.compress(levels_HWC.astype("<u2").tobytes(), 6)
    options = metadata.options("TIFF", (width, height)) if metadata is not None else {}
    tags = options.get("tiffinfo") or ImageFileDirectory_v2()
    dpi = options.get("dpi")
    if dpi is not None:
        tags[282], tags[283], tags[296] = dpi[0], dpi[1], 2
    tags[256], tags[257], tags[258] = width, height, (16,) * channels
    tags[259], tags[262], tags[277], tags[278] = 8, 1 if channels == 1 else 2, channels, height
    tags.tagtype[273], tags[273], tags[279], tags[284] = 4, 0, len(strip), 1
    if channels == 4:
        tags[338] = 2
    if icc:
        tags.tagtype[34675], tags[34675] = 7, icc
    file = io.BytesIO()
    tags.save(file)  # moves the strip's offset, 0, behind the directory
    return file.getvalue() + strip
