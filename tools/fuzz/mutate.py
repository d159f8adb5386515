"""Damaging bytes and JSON, the same for the same generator."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

_NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 32767, 65535, 1 << 16, (1 << 24) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_TEXTS = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"..",
    b"/etc/passwd",
    b"../../x",
    b"[" * 3000,
    b"{" * 50,
    b"9" * 5000,
    b"NaN",
    b"-1",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2,
    7,
    255,
    1 << 20,
    1 << 31,
    1 << 53,
    1 << 70,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 5000,
    "../../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "x/y",
    [],
    {},
    [[]],
    [[[[1]]]],
    {"": {"": {}}},
    ["x", 1, None],
    list(range(100)),
)
"""What a value in a JSON text is replaced by."""


def damaged(content: bytes, others: Sequence[bytes], draw: Random) -> bytes:
    """A copy of `content` with one to four things done to it; `others` are contents of the same kind to mix with."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        draw.choice(_BYTE_CHANGES)(data, others, draw)
    return bytes(data)


def _place(data: bytearray, draw: Random) -> int:
    """Anywhere, the beginning more often: headers are there."""
    return draw.randrange(min(len(data), draw.choice((16, 64, 512, 1 << 30))) or 1)


def _flip(data: bytearray, others: Sequence[bytes], draw: Random) -> None:
    if data:
        data[_place(data, draw) % len(data)] ^= 1 << draw.randrange(8)


def _number(data: bytearray, others: Sequence[bytes], draw: Random) -> None:
    place, width, order = _place(data, draw), draw.choice((1, 2, 4, 8)), draw.choice(("big", "little"))
    value = draw.choice(_NUMBERS) % (1 << (8 * width))
    data[place : place + width] = value.to_bytes(width, order)  # type: ignore[arg-type]


def _noise(data: bytearray, others: Sequence[bytes], draw: Random) -> None:
    place, length = _place(data, draw), draw.randrange(1, 32)
    data[place : place + length] = draw.randbytes(length)


def _cut_out(data: bytearray, others: Sequence[bytes], draw: Random) -> None:
    place = _place(data, draw)
    del data[place : place + draw.randrange(1, 64)]


def _repeat(data: bytearray, others: Sequence[bytes], draw: Random) -> None:
    place = _place(data, draw)
    data[place:place] = data[place : place + draw.randrange(1, 256)] * draw.choice((1, 2, 50))


def _end(data: bytearray, others: Sequence[bytes], draw: Random) -> None:
    del data[_place(data, draw) :]


def _insert(data: bytearray, others: Sequence[bytes], draw: Random) -> None:
    place = _place(data, draw)
    data[place:place] = draw.choice(_TEXTS)


def _mix(data: bytearray, others: Sequence[bytes], draw: Random) -> None:
    other = draw.choice(others)
    data[_place(data, draw) :] = other[draw.randrange(len(other) or 1) :]


_BYTE_CHANGES: tuple[Callable[[bytearray, Sequence[bytes], Random], None], ...] = (
    _flip,
    _flip,
    _number,
    _number,
    _noise,
    _cut_out,
    _repeat,
    _end,
    _insert,
    _mix,
)


def damaged_json(value: Any, draw: Random) -> Any:
    """A copy of a JSON value with one to three of its parts replaced, removed, doubled or renamed."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        copy = _changed(copy, draw)
    return copy


def _changed(value: Any, draw: Random) -> Any:
    """Walk down at random and change what is there."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        return _changed_entry(dict(value), key, draw)
    if isinstance(value, list) and value and draw.random() < 0.9:
        items, index = list(value), draw.randrange(len(value))
        items[index] = _changed(items[index], draw)
        return items[:index] if draw.random() < 0.1 else items
    return draw.choice(VALUES)


def _changed_entry(entries: dict[str, Any], key: str, draw: Random) -> dict[str, Any]:
    what = draw.random()
    if what < 0.1:
        del entries[key]
    elif what < 0.2:
        entries[str(draw.choice(("x", "", "attn_implementation", key + "x")))] = entries.pop(key)
    else:
        entries[key] = _changed(entries[key], draw)
    return entries


def dumped(value: Any) -> bytes:
    """A JSON text, NaN and halves of letters as they are."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
