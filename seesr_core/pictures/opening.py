"""The one door by which picture files come in: formats, pixels and errors are bounded here, for every reader."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from ..errors import ImageError, SeeSRError
from ..runtime.memory import require_memory

FORMATS_READ = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read, whatever a file is called. Others are not asked: some of their readers
start a program (Ghostscript for EPS) or take what is no picture."""

_DECODED_BYTES = 16
"""Most bytes a pixel takes while a photo is read: decoded, turned, converted and apart from its alpha."""
_ORDINARY = 48 << 20
"""Pixels that a file of any size may claim."""
_MOST_PIXELS_A_BYTE = 100
"""Above that a file must have a byte for so many pixels: photos have one for fifty at the very most."""


def suffixes_read() -> set[str]:
    """The suffixes of the formats that are read, in lower case with their dot."""
    _init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS_READ}


@contextmanager
def open_picture(path: str | os.PathLike[str], stream: IO[bytes] | None = None) -> Iterator[Image.Image]:
    """A picture whose header is read; whatever its decoder then says within the block is one kind of error.

    Args:
        path: the file, or the name of what `stream` gives.
        stream: bytes that lie elsewhere, such as in a shard; seekable.

    Raises:
        ImageError: missing, empty, no ordinary file, no picture of `FORMATS_READ`, damaged, or one that claims more
            pixels than its bytes can hold.
        ResourceError: too large to be decoded in the memory that is left.
    """
    source = Path(path)
    size = _file_size(source) if stream is None else stream.seek(0, os.SEEK_END)
    if size == 0:
        raise ImageError(f"{source} is empty (0 bytes): expected a picture. Copy or download it again.")
    if stream is not None:
        stream.seek(0)
    with _one_sentence(source), _WITHOUT_LIMITS, Image.open(stream or source, formats=_readable()) as image:
        _check_pixels(image, source, size)
        yield image


def _init() -> None:
    """Load Pillow's formats, and HEIC where the package pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()


def _readable() -> list[str]:
    """Those of `FORMATS_READ` that this Pillow has."""
    _init()
    return [name for name in FORMATS_READ if name in Image.OPEN]


def _file_size(source: Path) -> int:
    try:
        found = source.stat()
    except (OSError, ValueError) as error:
        raise ImageError(
            f"{source} cannot be read: {getattr(error, 'strerror', None) or error}. Check the name."
        ) from error
    if stat.S_ISDIR(found.st_mode):
        raise ImageError(f"{source} is a folder: expected a picture file.")
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"{source} is a pipe or a device: expected a picture file.")
    return found.st_size


def _check_pixels(image: Image.Image, source: Path, size: int) -> None:
    width, height = image.size
    pixels = width * height
    what = f"{source} ({width}×{height} pixels)"
    require_memory(pixels * _DECODED_BYTES, what, "cut it into parts or reduce it")
    if pixels > _ORDINARY and pixels > size * _MOST_PIXELS_A_BYTE:
        raise ImageError(f"{what} has {size:,} bytes, too few for so many pixels: it is damaged or made to do harm.")


@contextmanager
def _one_sentence(source: Path) -> Iterator[None]:
    try:
        yield
    except (SeeSRError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{source} is not a picture that can be read: expected PNG, JPEG, WebP, TIFF, GIF, BMP, AVIF, JPEG 2000 "
            "or PPM."
        ) from error
    except PermissionError as error:
        raise ImageError(f"{source} cannot be read: {error.strerror}. Check its permissions.") from error
    except Exception as error:  # decoders raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{source} is truncated or damaged ({reason}). Copy or download it again.") from error


class _WithoutLimits:
    """Pillow refuses pictures beyond a fixed number of pixels and warns of oddities, by settings of the whole process.

    Within the block neither happens; several threads may be in it at once, and the last one out puts them back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._settings = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._settings.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                self._settings.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._settings.close()


_WITHOUT_LIMITS = _WithoutLimits()
