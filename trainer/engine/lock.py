"""One run per folder, and one eye on the other processes of a run.

Both rest on file locks, which the operating system takes back from a process however it ends: what is locked is alive.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from seesr_core.errors import DataError
from seesr_core.formats.schema import read, read_json
from seesr_core.runtime.files import write_text

log = logging.getLogger(__name__)

LOCK, OWNER = ".lock", ".owner.json"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder; a lock that a dead process left behind is taken over.

    Raises:
        DataError: a living run holds it; the message has its process and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(
            f"{folder} is in use by {_owner(folder / OWNER)}. Wait for that run to end, or choose another folder."
        ) from error
    try:
        _sign(folder / OWNER)
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _sign(path: Path) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    write_text(path, json.dumps(owner))


def _owner(path: Path) -> str:
    try:
        owner: dict[str, Any] = read(dict[str, Any], read_json(path))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"


class Watch:
    """Tells which processes of a run have ended without having finished.

    Every process holds a lock of its own in `folder` as long as it lives; a thread looks at the others' now and then,
    so that none waits for ever in a collective for one that is gone.

    Args:
        folder: shared by all processes of the run.
        rank: of this process.
        count: of processes.
        on_loss: told about a lost process in a sentence; it must end this process.
        interval: seconds between looks.
    """

    def __init__(
        self, folder: Path, rank: int, count: int, on_loss: Callable[[str], object], *, interval: float = 2.0
    ) -> None:
        self.folder, self.rank, self.count = folder, rank, count
        self.on_loss, self.interval = on_loss, interval
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._done(rank).unlink(missing_ok=True)
        _sign(self._sheet(rank))
        self.lock = FileLock(self._lock(rank))
        self.lock.acquire(timeout=10)

    def start(self) -> None:
        """Begin to look; every process must have made its watch by now."""
        self.thread.start()

    def finish(self) -> None:
        """Stop looking and say that this process ended well."""
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        self._done(self.rank).touch()
        self.lock.release()

    def lost(self, patience: float = 0.0) -> str:
        """A sentence about the processes that have ended, or nothing; `patience` seconds for them to be noticed."""
        until = time.monotonic() + patience
        while True:
            ranks = [rank for rank in range(self.count) if rank != self.rank and self._is_lost(rank)]
            if ranks or time.monotonic() >= until:
                break
            time.sleep(0.1)
        names = ", ".join(f"rank {rank} ({_owner(self._sheet(rank))})" for rank in ranks)
        return f"{names} has ended, so this run stops. The same command goes on from the last checkpoint." * bool(ranks)

    def _is_lost(self, rank: int) -> bool:
        if self._done(rank).exists():
            return False
        try:
            with FileLock(self._lock(rank), timeout=0):
                return not self._done(rank).exists()
        except Timeout:
            return False

    def _look(self) -> None:
        while not self.stopped.wait(self.interval):
            if sentence := self.lost():
                self.on_loss(sentence)
                return

    def _lock(self, rank: int) -> Path:
        return self.folder / f"{rank}.lock"

    def _sheet(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _done(self, rank: int) -> Path:
        return self.folder / f"{rank}.done"


def leave(sentence: str) -> None:
    """End this process at once: a thread that waits in a collective cannot be interrupted otherwise."""
    log.error("%s", sentence)
    logging.shutdown()
    os._exit(1)
