"""Tables and byte counts for a person."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .console import is_terminal, printable, say


def say_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest entry, the last one as long as it likes."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    for row in (head, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        say("  ".join([*cells, row[-1]]).rstrip())


def size_text(size: float) -> str:
    """Bytes for a person, from "22 kB" to "5.63 GB"."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 1)):
        if size >= 0.95 * scale:
            return f"{size / scale:.{digits}f} {unit}"
    return f"{size / 1e3:.0f} kB"


@contextmanager
def bytes_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) in bytes that draws a bar with speed and time left; nothing without a terminal."""
    if not is_terminal():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=printable(name), unit="B", unit_scale=True, leave=False, delay=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
