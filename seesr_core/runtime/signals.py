"""Being asked to end: SIGTERM unwinds the program as Ctrl-C does, so that everything is left as it should be."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes by custom: 128 and the signal's number."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread; in others, and where somebody else cares, it does not."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated


def exit_code(error: KeyboardInterrupt) -> int:
    """What a process that was ended so returns."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def how(error: KeyboardInterrupt) -> str:
    """The same as the first word of a sentence."""
    return "Terminated" if isinstance(error, Terminated) else "Interrupted"
