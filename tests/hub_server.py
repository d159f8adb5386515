"""A stand-in for the model hub on a loopback port: the part of its protocol that downloads use, and its bad days.

Large files answer HEAD with a redirect that announces size and sha256, as the hub does for LFS files; small ones
directly.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1024


@dataclass(kw_only=True)
class Day:
    """How one file behaves; what is counted down applies to the first requests for its bytes."""

    cuts: list[int] = field(default_factory=list)
    """Bodies that end after so many bytes, one a request."""
    stalls: list[int] = field(default_factory=list)
    """Bodies that pause for `pause` seconds after so many bytes."""
    pause: float = 0.0
    """Length of a stall, in seconds."""
    statuses: list[int] = field(default_factory=list)
    """Answers instead of the file to HEAD and GET, one a request; the last one is repeated if `always`."""
    always: bool = False
    """Whether the last status is for every further request."""
    statuses_of_get: list[int] = field(default_factory=list)
    """Statuses for GET requests alone."""
    body: bytes | None = None
    """What is sent instead of what was announced."""
    ignores_ranges: bool = False
    """Whether requests for a part are answered with the whole."""
    secretive: bool = False
    """Whether the hash of a large file is not announced."""
    elsewhere: str = ""
    """Address that GET requests are sent on to."""


@dataclass(kw_only=True)
class Hub:
    """Files by `repo/path`, and what was asked for."""

    files: dict[str, bytes | memoryview] = field(default_factory=dict)
    days: dict[str, Day] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, name, Range header) in order."""
    logins: list[str] = field(default_factory=list)
    """Authorization headers, one a request."""
    url: str = ""
    _digests: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: bytes, **day: object) -> None:
        """Offer `content` as `owner/repo/path`."""
        self.files[name] = content
        self.days[name] = Day(**day)  # type: ignore[arg-type]

    def add_file(self, name: str, path: Path) -> None:
        """Offer a file of any size, which is read when it is asked for."""
        with path.open("rb") as handle:
            self.files[name] = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        self.days[name] = Day()

    def digest(self, name: str) -> str:
        """The sha256 of a file."""
        if name not in self._digests:
            self._digests[name] = hashlib.sha256(self.files[name]).hexdigest()
        return self._digests[name]

    def gets(self, name: str) -> list[str]:
        """The Range headers of the requests for the bytes of `name`."""
        return [range_ for method, asked, range_ in self.requests if (method, asked) == ("GET", name)]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Inside, `hub` answers at `hub.url`."""

    class Handler(_Handler):
        content = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    content: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Tests have no use for an access log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.close_connection = True
        name = self._name()
        self.content.requests.append((self.command, name, self.headers.get("Range", "")))
        self.content.logins.append(self.headers.get("Authorization", ""))
        if name not in self.content.files:
            self._refuse(404)
            return
        body, day = self.content.files[name], self.content.days[name]
        status = self._bad_status(day)
        if status:
            self._refuse(status)
        elif day.elsewhere and self.command == "GET":
            self.send_response(302)
            self.send_header("Location", day.elsewhere)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.command == "HEAD":
            self._announce(name, body, day)
        else:
            self._send(name, body if day.body is None else day.body, day)

    def _name(self) -> str:
        """`/owner/repo/resolve/main/a/b` (with `/spaces` in front of a space's) → `owner/repo/a/b`."""
        path = self.path.split("?")[0].strip("/").removeprefix("spaces/").removeprefix("plain/")
        parts = path.split("/")
        return "/".join(parts[:2] + parts[4:]) if parts[2:3] == ["resolve"] else path

    def end_headers(self) -> None:
        """Every connection serves one request and says so, lest a client sends its next one into a closed one."""
        self.send_header("Connection", "close")
        super().end_headers()

    def _bad_status(self, day: Day) -> int:
        for statuses in (day.statuses, *([day.statuses_of_get] if self.command == "GET" else [])):
            if statuses:
                return statuses[0] if day.always and len(statuses) == 1 else statuses.pop(0)
        return 0

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        if status == 429:
            self.send_header("Retry-After", "7")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _announce(self, name: str, body: bytes | memoryview, day: Day) -> None:
        large = len(body) > LARGE
        digest = self.content.digest(name) if large else hashlib.sha1(body).hexdigest()
        self.send_response(302 if large else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if large:
            self.send_header("Location", f"http://files.invalid/{name}")
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("X-Linked-Etag", '"opaque"' if day.secretive else f'"{digest}"')
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", "0" if large else str(len(body)))
        self.end_headers()

    def _send(self, name: str, body: bytes | memoryview, day: Day) -> None:
        start = self._start(day)
        if start >= len(body) > 0:
            self._refuse(416)
            return
        rest = body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", f'"{self.content.digest(name)}"')
        self.end_headers()
        self._stream(rest, day)

    def _start(self, day: Day) -> int:
        asked = self.headers.get("Range", "")
        return 0 if day.ignores_ranges or not asked else int(asked.removeprefix("bytes=").split("-")[0])

    def _stream(self, rest: bytes | memoryview, day: Day) -> None:
        try:
            if day.cuts:
                self.wfile.write(rest[: day.cuts.pop(0)])
                self.wfile.flush()
                return  # the connection closes although more was promised
            if day.stalls:
                count = day.stalls.pop(0)
                self.wfile.write(rest[:count])
                self.wfile.flush()
                threading.Event().wait(day.pause)  # tests replace time.sleep
                rest = rest[count:]
            self.wfile.write(rest)
        except OSError:
            pass  # the client had enough
