"""sha256 of files that are larger than memory, with progress."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total) bytes."""

_BLOCK = 1 << 22


def sha256(path: str | os.PathLike[str], progress: Progress = lambda done, total: None) -> str:
    """The hash of a whole file, in lower-case hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest, total, done = hashlib.sha256(), os.path.getsize(path), 0
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
            done += len(block)
            progress(done, total)
    return digest.hexdigest()
