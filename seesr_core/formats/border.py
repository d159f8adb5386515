"""The border at which files come in: whatever goes wrong with what a file holds is one sentence that names it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ResourceError, SeeSRError, SettingsError, WeightsError
from ..runtime.memory import is_exhaustion
from .sources import Source

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)


@contextmanager
def one_sentence(path: str | os.PathLike[str], expected: Source | None = None) -> Iterator[None]:
    """Inside, errors about the contents of `path` become WeightsErrors that begin with it.

    A library that is handed a damaged file raises what it likes, so that everything counts as damage except memory that
    is exhausted and errors that already are sentences.

    Args:
        path: the file or folder that is being read.
        expected: what should be there, and where to get it.

    Raises:
        WeightsError: anything else went wrong inside.
    """
    try:
        yield
    except (WeightsError, SettingsError) as error:
        text = str(error) if str(path) in str(error) else f"{path}: {error}"
        told = expected is None or expected.where in text
        raise WeightsError(
            text if told or expected is None else f"{text} Get {expected.name} from {expected.where}."
        ) from error
    except (SeeSRError, ModuleNotFoundError):
        raise
    except Exception as error:
        if is_exhaustion(error):
            raise
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise ResourceError(
                f"Reading {path} needs temporary files, which cannot be written: {error.strerror}. Make room."
            ) from error
        text = " ".join(str(error).split())[:200] or "no reason is given"
        again = f"Get {expected.name} again from {expected.where}." if expected else "Get it again."
        raise WeightsError(
            f"{path} cannot be loaded, it is damaged or another file ({type(error).__name__}: {text}). {again}"
        ) from error
