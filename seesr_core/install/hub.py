"""One file from one source, over huggingface_hub: what the source says of it, and its bytes, resumed if they break off.

The library's own `hf_hub_download` forgets a half-downloaded file when the process ends, so the bytes go through its
`http_get` into a partial file of ours, which the next run continues.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ..errors import ResourceError
from .hashing import Progress
from .manifest import Source

log = logging.getLogger(__name__)

_HUB, _HUB_HOST = "https://huggingface.co", "huggingface.co"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRIES = 4
_CHUNK = 1 << 18
"""Bytes that a broken connection can cost at most; the library gathers ten million before it writes any."""
_LONGEST_WAIT = 60
_TRANSPORT = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")
"""Packages whose errors mean that a transfer failed; which of them is in use depends on huggingface_hub's version."""
_BUSY = (408, 429, 500, 502, 503, 504)
_WRONG_PART = 416
_SAID = {
    401: "it asks for a login (`hf auth login`, or the variable HF_TOKEN)",
    403: "access is refused; its terms may have to be accepted on its page first",
    404: "it has no such file",
    429: "it refuses more requests for now (429)",
}


class SourceError(Exception):
    """A source that does not give the file; the message is read after its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remote:
    """A file as a source announces it."""

    url: str
    """Address of the file's bytes."""
    size: int | None = None
    """Size of the file in bytes, if announced."""
    sha256: str | None = None
    """Hash, if announced; hubs do so for large files."""
    tag: str = ""
    """Changes when the content does; empty if the source announces nothing."""
    commit: str = ""
    """Version of the source's repository; empty if it does not say."""
    headers: dict[str, str] = field(default_factory=dict)
    """HTTP headers to send along, such as the user's login."""


def locate(source: Source, path: str) -> Remote:
    """Ask a source about the file `path`, without its bytes.

    Raises:
        SourceError: it cannot be reached, lacks the file or refuses it.
    """
    if source.url:
        return Remote(url=source.url)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not in its __all__

    kind = None if source.type == "model" else source.type
    # Read here and not by the library, whose copy is as old as its import.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(source.repo, f"{source.prefix}{path}", repo_type=kind, revision=source.revision, endpoint=endpoint)
    token = _login(endpoint)
    for attempt in range(_TRIES):
        try:
            with _transport_errors(last=attempt == _TRIES - 1, passing=_BUSY):
                found = get_hf_file_metadata(url, token=token)
                tag = found.etag or ""
                digest = tag if _SHA256.fullmatch(tag) else None
                headers = build_hf_headers(token=token)
                commit = found.commit_hash or ""
                return Remote(url=url, size=found.size, sha256=digest, tag=tag, commit=commit, headers=headers)
        except _TryAgainError as error:
            time.sleep(error.wait or 2**attempt)
    raise SourceError("it did not answer")


def _login(endpoint: str | None) -> bool | str | None:
    """The user's login: for the hub that gave it, and for another only where both were named together."""
    address = urlsplit(endpoint or _HUB)
    host = address.hostname or ""
    if address.scheme == "https" and (host == _HUB_HOST or host.endswith(f".{_HUB_HOST}")):
        return None  # as the library finds it
    return os.environ.get("HF_TOKEN") or False


def fetch(remote: Remote, part: Path, progress: Progress) -> None:
    """Bring the bytes into `part`, beginning where it ends.

    Raises:
        SourceError: the transfer broke off again and again; `part` keeps what came.
        ResourceError: the disk is full.
    """
    failures, before = 0, -1
    while True:
        done = part.stat().st_size if part.exists() else 0
        failures = 0 if done > before else failures + 1
        before = done
        try:
            # http_get has already waited for 408 and 429.
            with _transport_errors(last=failures >= _TRIES - 1, passing=(*_BUSY[2:], _WRONG_PART)), _full_disk(part):
                _transfer(remote, part, done, progress)
            return
        except _TryAgainError as error:
            if error.status == _WRONG_PART:
                part.unlink(missing_ok=True)
            log.info("%s, trying again", error)
            time.sleep(error.wait or min(2**failures, 8))


class _TryAgainError(Exception):
    """Something that may pass."""

    def __init__(self, reason: str, *, wait: int = 0, status: int = 0) -> None:
        super().__init__(reason)
        self.wait, self.status = wait, status


def _transfer(remote: Remote, part: Path, done: int, progress: Progress) -> None:
    from huggingface_hub.file_download import http_get

    if remote.size is not None and done > remote.size:
        part.unlink()
        done = 0
    headers = {**remote.headers, "Accept-Encoding": "identity"}  # a compressed body could not be continued
    with part.open("ab") as handle, _small_chunks():
        counted: Any = _Counted(handle, remote.size or 0, progress)
        http_get(remote.url, counted, resume_size=done, headers=headers, expected_size=remote.size)


@contextmanager
def _small_chunks() -> Iterator[None]:
    """The library has no setting for this but the constant that it reads when a transfer begins."""
    from huggingface_hub import constants

    before = constants.DOWNLOAD_CHUNK_SIZE
    constants.DOWNLOAD_CHUNK_SIZE = min(before, _CHUNK)
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = before


class _Counted:
    """A file that tells how far it is."""

    def __init__(self, handle: BinaryIO, total: int, progress: Progress) -> None:
        self._handle, self._total, self._progress = handle, total, progress

    def write(self, data: bytes) -> int:
        written = self._handle.write(data)
        self._progress(self._handle.tell(), max(self._total, self._handle.tell()))
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


@contextmanager
def _full_disk(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"The disk of {part.parent} is full: make room and give the same command again; what has come is kept."
        ) from error


@contextmanager
def _transport_errors(*, last: bool, passing: tuple[int, ...]) -> Iterator[None]:
    """Inside, errors of the transfer become `_TryAgainError`, or `SourceError` on the `last` try.

    Of answers that are errors, only those with a status in `passing` are worth another try.
    """
    try:
        yield
    except Exception as error:
        status = int(getattr(getattr(error, "response", None), "status_code", 0) or 0)
        if not status and not _is_transport(error):
            raise
        reason = _reason(error, status)
        if last or (status and status not in passing):
            raise SourceError(reason) from error
        raise _TryAgainError(reason, wait=_wait(error), status=status) from error


def _is_transport(error: Exception) -> bool:
    if any(base.__module__.split(".")[0].startswith(_TRANSPORT) for base in type(error).__mro__):
        return True
    return isinstance(error, ConnectionError | TimeoutError) or "Consistency check failed" in str(error)


def _reason(error: Exception, status: int) -> str:
    if status:
        return _SAID.get(status, f"the server answered {status}")
    first = " ".join(str(error).split()) or type(error).__name__
    return f"the transfer failed ({first[:120]})"


def _wait(error: Exception) -> int:
    """Seconds that the server asks to wait."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return min(int(text), _LONGEST_WAIT) if text.isdecimal() else 0
