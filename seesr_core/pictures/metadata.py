"""What goes beside a photo's pixels and stays with its result: EXIF, XMP, resolution, texts of a PNG."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .sizes import Size

log = logging.getLogger(__name__)

_ORIENTATION = 0x0112
_EXIF, _GPS, _XMP_TAG = 0x8769, 0x8825, 700
_SIZES = {0x0100: 0, 0x0101: 1}
"""Tags of the main directory that repeat the picture's width and height, and which of both."""
_EXIF_SIZES = {0xA002: 0, 0xA003: 1}
"""The same of the EXIF directory."""
_PIXEL_TAGS = frozenset(
    {0x0100, 0x0101, 0x0102, 0x0103, 0x0106, 0x0111, 0x0112, 0x0115, 0x0116, 0x0117, 0x011C, 0x013D, 0x0142, 0x0143}
    | {0x0144, 0x0145, 0x0152, 0x0153, 0x015B, 0x0201, 0x0202, _XMP_TAG, 34675, _EXIF, _GPS}
)
"""Tags of a TIFF that speak of how its own pixels, profile, XMP or further directories are stored, not of the photo."""
_XMP_TEXT = "XML:com.adobe.xmp"
_XMP_SIZES = {"tiff:ImageWidth": 0, "tiff:ImageLength": 1, "exif:PixelXDimension": 0, "exif:PixelYDimension": 1}
_DAMAGED = (ValueError, TypeError, KeyError, OSError, SyntaxError, struct.error, OverflowError, AttributeError)


@dataclass(kw_only=True, slots=True)
class Metadata:
    """What a photo's file says beside its pixels."""

    exif: Image.Exif | None = None
    """EXIF without the orientation, which is applied to the pixels."""
    xmp: bytes = b""
    """The XMP packet."""
    dpi: tuple[float, float] | None = None
    """Pixels an inch, across and down."""
    texts: dict[str, str] = field(default_factory=dict)
    """Texts of a PNG by their keyword."""

    def options(self, kind: str, size: Size) -> dict[str, Any]:
        """Arguments for Pillow's `save` of a result of `size` in the format `kind`; what it cannot hold is left out."""
        found: dict[str, Any] = {}
        if self.dpi is not None and kind in ("PNG", "JPEG", "TIFF"):
            found["dpi"] = self.dpi
        exif, xmp = self._exif_bytes(size), _resized_xmp(self.xmp, size)
        if kind == "TIFF":
            return found | self._tiff(xmp)
        if exif:
            found["exif"] = exif
        if kind == "PNG":
            return found | self._png(xmp)
        return found | ({"xmp": xmp} if xmp and kind in ("JPEG", "WEBP", "AVIF") else {})

    def _exif_bytes(self, size: Size) -> bytes:
        if self.exif is None or not len(self.exif):
            return b""
        try:
            _resize(self.exif, size)
            return self.exif.tobytes()
        except _DAMAGED as error:
            log.warning("the photo's EXIF is damaged (%s) and was left out", error)
            return b""

    def _png(self, xmp: bytes) -> dict[str, Any]:
        info = PngInfo()
        for keyword, text in self.texts.items():
            info.add_itxt(keyword, text)
        if xmp:
            info.add_itxt(_XMP_TEXT, xmp.decode("utf-8", "replace"))
        return {"pnginfo": info} if info.chunks else {}

    def _tiff(self, xmp: bytes) -> dict[str, Any]:
        """EXIF's main directory is the TIFF's own; Pillow writes no further ones into compressed files."""
        tags = ImageFileDirectory_v2()
        if self.exif is not None:
            for tag, value in self.exif.items():
                if tag not in _PIXEL_TAGS:
                    tags[tag] = value
        if xmp:
            tags.tagtype[_XMP_TAG], tags[_XMP_TAG] = 1, xmp
        return {"tiffinfo": tags} if len(tags) else {}


def read_metadata(image: Image.Image) -> Metadata:
    """What an open picture says; entries that cannot be read are left out."""
    info = image.info
    found = Metadata(xmp=_xmp(image))
    dpi = info.get("dpi")
    if isinstance(dpi, tuple) and len(dpi) == 2 and all(float(value) > 0 for value in dpi):
        found.dpi = (float(dpi[0]), float(dpi[1]))
    if image.format == "PNG":
        texts: Mapping[str, Any] = getattr(image, "text", {})
        found.texts = {key: str(text) for key, text in texts.items() if key != _XMP_TEXT}
    try:
        exif = image.getexif()
        if len(exif):
            exif.pop(_ORIENTATION, None)
            exif.get_ifd(_EXIF)  # now: its bytes lie in the file
            found.exif = exif
    except _DAMAGED as error:
        log.warning("the photo's EXIF is damaged (%s) and was left out", error)
    return found


def _xmp(image: Image.Image) -> bytes:
    found = image.info.get("xmp") or image.info.get(_XMP_TEXT) or b""
    packet = found.encode("utf-8") if isinstance(found, str) else bytes(found)
    # The pixels are turned upright.
    return re.sub(rb'(tiff:Orientation(?:="|>))\d', rb"\g<1>1", packet)


def _resize(exif: Image.Exif, size: Size) -> None:
    for directory, tags in ((exif, _SIZES), (exif.get_ifd(_EXIF), _EXIF_SIZES)):
        for tag, side in tags.items():
            if tag in directory:
                directory[tag] = size[side]


def _resized_xmp(packet: bytes, size: Size) -> bytes:
    for name, side in _XMP_SIZES.items():
        pattern = rb'(%s(?:="|>))\d+' % name.encode()
        packet = re.sub(pattern, rb"\g<1>%d" % size[side], packet)
    return packet
