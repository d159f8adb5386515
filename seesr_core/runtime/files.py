"""Files in and out: written whole or not at all, read within bounds, and never outside the folder they belong to.

On Linux a file has no name until it is whole, so that nothing half-written is left behind, whoever kills the process.
Elsewhere it has a temporary name that carries its owner's process; the next run removes what dead processes left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from ..errors import ResourceError

log = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\..*~([0-9a-f]{8})-(\d+)-[0-9a-f]{8}(\.[^.~]*)?")
_STEM_BYTES = 80
_STALE = 24 * 3600
"""Seconds after which a temporary file of another machine's process is taken for abandoned."""
_LIVE: set[Path] = set()
"""Temporary files of this process."""
_SWEPT: set[Path] = set()


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file open for writing and seeking, that appears as `path` when the block ends well, and not at all else.

    Raises:
        ResourceError: the folder cannot be written to or the disk is full; `path` is then as it was before.
    """
    target = Path(path)
    _make_folder(target)
    handle = _open_nameless(target.parent)
    if handle is None:
        with atomic_write(target) as temporary, temporary.open("r+b") as named:
            yield named
        return
    # The handle is the innermost: closing it writes what is left, which a full disk refuses once more.
    with _temporary_name(target) as temporary, _one_sentence(target, temporary), handle:
        yield handle
        handle.flush()
        _link(handle, temporary)
        os.replace(temporary, target)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `whole_file` for programs that want a path: on a clean exit the file there takes the place of `path`.

    The temporary name keeps the suffix of `path`, since writers choose their format by it.

    Raises:
        ResourceError: as `whole_file`.
    """
    target = Path(path)
    _make_folder(target)
    with _temporary_name(target) as temporary, _one_sentence(target, temporary):
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        os.replace(temporary, target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file, whole or not at all; halves of letters, as in odd file names, are escaped as JSON does.

    Raises:
        ResourceError: as `whole_file`.
    """
    with whole_file(path) as handle:
        handle.write(text.encode("utf-8", "backslashreplace"))


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of an ordinary file.

    Raises:
        OSError: it cannot be read, is a folder, a pipe or a device, or has more than `most` bytes; `strerror` says so.
    """
    with _open_ordinary(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {most:,} that are read", str(path))
        return handle.read()


def read_text(path: str | os.PathLike[str], most: int = 1 << 28, *, errors: str = "strict") -> str:
    """The text of an ordinary file in UTF-8; `errors` as `bytes.decode` has it.

    Raises:
        OSError: as `read_bytes`, or it is no UTF-8.
    """
    try:
        text = read_bytes(path, most).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, "it is no text in UTF-8", str(path)) from error
    return text.replace("\r\n", "\n")


def _open_ordinary(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        handle = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller closes it
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, "it has an impossible name", repr(path)) from error
    mode = os.fstat(handle.fileno()).st_mode
    if not stat.S_ISREG(mode):
        handle.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device, no file", str(path))
    return handle


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe waits for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def listed(folder: Path) -> list[Path]:
    """What is in a folder, sorted; nothing, after a warning, where the system does not let us look."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        pass_over(error)
        return []


def pass_over(error: OSError) -> None:
    """Tell that a folder is left out because it cannot be read."""
    log.warning("%s is left out: %s", error.filename, error.strerror)


def inside(folder: Path, name: str) -> Path:
    """What `name` is below `folder`.

    Raises:
        ValueError: an absolute name, one that leads out of the folder, or none.
    """
    parts = re.split(r"[\\/]", name)
    if not name or "\0" in name or ".." in parts or PurePath(name).is_absolute() or parts[0] == "" or ":" in parts[0]:
        raise ValueError(f"{name!r} does not name anything inside {folder}")
    return folder / name


def _make_folder(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(target, error) from error
    _sweep(target.parent)


def _not_writable(target: Path, error: OSError) -> ResourceError:
    return ResourceError(f"Cannot write into {target.parent}: {error.strerror or error}. Choose another folder.")


@contextlib.contextmanager
def _one_sentence(target: Path, temporary: Path) -> Iterator[None]:
    """What the system says of these two, or of a file without a name, in one kind of error; the rest passes."""
    try:
        yield
    except OSError as error:
        named = str(error.filename)
        if error.filename is not None and named not in map(str, (target, temporary, target.parent)):
            raise
        if named == str(temporary) and not isinstance(error, FileExistsError):
            raise _not_writable(target, error) from error
        raise ResourceError(
            f"Could not write {target}: {error.strerror or error}. Nothing was changed there."
        ) from error


@contextlib.contextmanager
def _temporary_name(target: Path) -> Iterator[Path]:
    """A name beside `target` that carries this process; whatever has it at the end of the block is removed."""
    stem = os.fsdecode(os.fsencode(target.stem)[:_STEM_BYTES])
    temporary = target.with_name(f".{stem}~{_host()}-{os.getpid()}-{secrets.token_hex(4)}{target.suffix[:16]}")
    _LIVE.add(temporary)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _LIVE.discard(temporary)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _sweep(folder: Path) -> None:
    """Remove what dead processes left in a folder; looked at once by every process."""
    if folder in _SWEPT:
        return
    _SWEPT.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found and _is_abandoned(Path(entry.path), found[1], int(found[2])):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    if host == _host() and process == os.getpid():
        return path not in _LIVE
    if host != _host() or os.name != "posix":
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > _STALE
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _open_nameless(folder: Path) -> BinaryIO | None:
    """An unnamed file in `folder`; None where the system has no such thing, or cannot name it afterwards."""
    try:
        with _nameless(folder) as probe, _temporary_name(folder / "probe") as name:
            _link(probe, name)
        return _nameless(folder)
    # No O_TMPFILE (not Linux), no links to open files, or a file system without either.
    except (AttributeError, NotImplementedError, OSError):
        return None  # atomic_write says what is wrong with the folder, if anything is


def _nameless(folder: Path) -> BinaryIO:
    return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")


def _link(handle: BinaryIO, path: Path) -> None:
    """Give an unnamed file a name. Only with a folder's descriptor does Python ask for the link behind /proc."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{handle.fileno()}", path.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)
