"""Files made to do harm, each the smallest that once did; what they are is in their names."""

from __future__ import annotations

import struct
import zlib

EPS_LOOP = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{} loop\n"
"""A PostScript program that never ends; some picture libraries hand it to Ghostscript."""


def png(width: int, height: int, *, data: bytes = b"", colour_type: int = 2, depth: int = 8) -> bytes:
    """A PNG that claims a size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
