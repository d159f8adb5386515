"""Files are written beside their place and renamed, so that a reader never meets half a file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ResourceError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on a clean exit it takes the place of `path`, else it is removed.

    The temporary name keeps the suffix of `path`, since image writers choose their format by it.

    Raises:
        ResourceError: the folder cannot be written to or the disk is full; `path` is then as it was before.
    """
    target = Path(path)
    temporary = _reserve(target)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(target)):
            raise
        raise ResourceError(
            f"Could not write {target}: {error.strerror or error}. Nothing was changed there."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _reserve(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise ResourceError(
            f"Cannot write into {target.parent}: {error.strerror or error}. Choose another folder."
        ) from error
    os.close(handle)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
