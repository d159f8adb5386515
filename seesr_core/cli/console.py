"""What a person sees: lines, and a progress bar where there is a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


def say(line: str) -> None:
    """A line of the command's own output."""
    _write(sys.stdout, line)


def say_error(line: str) -> None:
    """A line about something that went wrong; where nobody can hear it, nothing happens."""
    with suppress(OSError, ValueError):
        _write(sys.stderr, line)


def _write(stream: TextIO | None, line: str) -> None:
    if stream is not None:  # the caller may have closed it
        stream.write(printable(line, stream.encoding or "utf-8") + "\n")


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` with `\\u…` for what a terminal would obey or cannot show; JSON remains JSON."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if _is_plain(letter, encoding) else _escaped(letter) for letter in text)


def _is_plain(letter: str, encoding: str) -> bool:
    if not (letter.isprintable() or letter in "\n\t"):
        return False
    try:
        letter.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _escaped(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def is_terminal() -> bool:
    """Whether a person watches: progress and summaries are for them alone."""
    return sys.stderr is not None and sys.stderr.isatty()


class _Lines(logging.Handler):
    """Log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say_error(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Inside, the project's own warnings are shown; on a terminal, what it does as well."""
    logger, handler = logging.getLogger("seesr_core"), _Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_terminal() else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that draws a bar with the time left; it does nothing without a terminal."""
    if not is_terminal():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(
        desc=printable(name), unit="call", leave=False, bar_format="{desc}: {percentage:3.0f}% |{bar}| {remaining} left"
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
