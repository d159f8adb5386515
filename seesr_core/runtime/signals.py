"""Being asked to end: SIGTERM unwinds the program as Ctrl-C does, so that everything is left as it should be."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes by custom: 128 and the signal's number."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


@dataclass(slots=True)
class Asked:
    """Whether the process was asked to end."""

    code: int = 0
    """What it then returns, whatever a library made of the interruption; 0 if it was not asked."""


@contextmanager
def terminable() -> Iterator[Asked]:
    """Inside, SIGTERM raises `Terminated` in the main thread; in others, and where somebody else cares, it does not.

    Libraries may catch what a signal raises and fail in words of their own, so the value tells that it came.
    """
    asked = Asked()

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    ours = ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    main = threading.current_thread() is threading.main_thread()
    before = [(number, usual) for number, usual in ours if main and signal.getsignal(number) is usual]
    for number, _ in before:
        signal.signal(number, interrupt)
    try:
        yield asked
    finally:
        for number, usual in before:
            signal.signal(number, usual)


def exit_code(error: KeyboardInterrupt) -> int:
    """What a process that was ended so returns."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def how(error: KeyboardInterrupt) -> str:
    """The same as the first word of a sentence."""
    return "Terminated" if isinstance(error, Terminated) else "Interrupted"
