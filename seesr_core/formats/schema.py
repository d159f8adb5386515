"""Data from outside: JSON within bounds, and values that must have a stated shape. The project's one validator.

What a value must be is said by a type: `int`, `str`, `list[str]`, `dict[str, int]`, `int | None`, `Literal[…]`,
`Annotated[int, Within(1, 4096)]`, or a dataclass or TypedDict of such fields, read from an object by the fields' names.
"""

from __future__ import annotations

import functools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union

from ..runtime.files import read_bytes

_Reader = Callable[[Any, str], Any]

MOST_BYTES = 1 << 28
"""Of a JSON text; the largest that are of use, annotations of a data set, have some hundred million."""
_LARGEST = 1 << 53
"""Whole numbers beyond it are not the same in every JSON reader."""


class MalformedError(ValueError):
    """What is wrong with a value; the sentence begins with where it is."""


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a number, or of how long a list or a text is; both allowed."""

    low: float
    high: float


Whole = Annotated[int, Within(0, _LARGEST)]
"""A count."""
Size = Annotated[int, Within(1, 1 << 24)]
"""A size of a tensor or a network."""
Number = Annotated[float, Within(-1e9, 1e9)]
"""An ordinary number."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        MalformedError: no JSON, NaN or Infinity in it, numbers of thousands of digits, or nested too deep.
    """
    if len(text) > MOST_BYTES:
        raise MalformedError(f"it has {len(text):,} bytes, more than the {MOST_BYTES:,} that are read")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except MalformedError:
        raise
    except json.JSONDecodeError as error:
        raise MalformedError(f"it is no JSON ({error.msg} at {error.pos})") from error
    except ValueError as error:
        raise MalformedError(f"it is no JSON ({error})") from error
    except RecursionError as error:
        raise MalformedError("it is nested too deep") from error


def _refuse_constant(name: str) -> Any:
    raise MalformedError(f"it holds {name}, which is no JSON number")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file.

    Raises:
        MalformedError: as `parse_json`. OSError: it cannot be read, or is no ordinary file.
    """
    return parse_json(read_bytes(path, MOST_BYTES))


def read(kind: Any, value: Any, where: str = "it", *, strict: bool = False) -> Any:
    """`value` as `kind`.

    Lists become tuples where `kind` says so, whole numbers floats; nothing else is converted.

    Args:
        kind: what it must be, see above.
        value: as `parse_json` gives it.
        where: its name, for messages.
        strict: whether objects may have no other entries than a dataclass has fields; else these are left out.

    Raises:
        MalformedError: it is something else, or out of bounds.
    """
    return _reader(kind, strict)(value, where)


@functools.cache
def _reader(kind: Any, strict: bool) -> _Reader:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return lambda value, where: value
    if origin is Annotated:
        return _bounded(_reader(arguments[0], strict), arguments[1])
    if origin is Literal:
        return _choice(arguments)
    if origin in (Union, types.UnionType):
        return _union(arguments, strict)
    if origin in (list, tuple):
        return _sequence(origin, arguments, strict)
    if origin in (dict, Mapping) or kind is dict:
        return _mapping(arguments or (str, Any), strict)
    if is_dataclass(kind):
        required = {f.name for f in fields(kind) if f.init and f.default is MISSING and f.default_factory is MISSING}
        return _object(kind, required, strict)
    if typing.is_typeddict(kind):
        return _object(kind, kind.__required_keys__, strict)
    return _SCALARS[kind]


def _refuse(where: str, expected: str, value: Any) -> MalformedError:
    if type(value) is int and value.bit_length() > 64:
        text = "one of very many digits"
    else:
        text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return MalformedError(f"{where} should be {expected}, found {text[:60]}")


def _whole(value: Any, where: str) -> int:
    if type(value) is not int or abs(value) > _LARGEST:
        raise _refuse(where, "a whole number", value)
    return value


def _number(value: Any, where: str) -> float:
    if type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    if type(value) is not float or not math.isfinite(value):
        raise _refuse(where, "a number", value)
    return value


def _truth(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise _refuse(where, "true or false", value)
    return value


def _text(value: Any, where: str) -> str:
    if type(value) is not str:
        raise _refuse(where, "text", value)
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise MalformedError(f"{where} should be text, found halves of letters in it")
    return value


def _nothing(value: Any, where: str) -> None:
    if value is not None:
        raise _refuse(where, "null", value)


_SCALARS: Mapping[Any, _Reader] = {
    int: _whole,
    float: _number,
    bool: _truth,
    str: _text,
    type(None): _nothing,
    None: _nothing,
}


def _bounded(inner: _Reader, bounds: Within) -> _Reader:
    def read_bounded(value: Any, where: str) -> Any:
        found = inner(value, where)
        measure = found if isinstance(found, int | float) else len(found)
        if not bounds.low <= measure <= bounds.high:
            of = "" if measure is found else "a length "
            raise _refuse(where, f"{of}from {bounds.low:g} to {bounds.high:g}", measure)
        return found

    return read_bounded


def _choice(allowed: tuple[Any, ...]) -> _Reader:
    def read_choice(value: Any, where: str) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise _refuse(where, f"one of {', '.join(map(str, allowed))}", value)
        return value

    return read_choice


def _union(kinds: tuple[Any, ...], strict: bool) -> _Reader:
    readers = [_reader(kind, strict) for kind in kinds if kind is not type(None)]
    optional = type(None) in kinds

    def read_union(value: Any, where: str) -> Any:
        if value is None and optional:
            return None
        reasons = []
        for reader in readers:
            try:
                return reader(value, where)
            except MalformedError as error:
                reasons.append(error)
        raise reasons[-1]

    return read_union


def _sequence(origin: type, kinds: tuple[Any, ...], strict: bool) -> _Reader:
    repeated = origin is list or kinds[-1] is Ellipsis
    readers = [_reader(kind, strict) for kind in kinds if kind is not Ellipsis]

    def read_sequence(value: Any, where: str) -> Any:
        if not isinstance(value, list | tuple) or not (repeated or len(value) == len(readers)):
            raise _refuse(where, "a list" if repeated else f"a list of {len(readers)}", value)
        chosen = readers * len(value) if repeated else readers
        return origin(reader(item, f"{where}[{i}]") for i, (reader, item) in enumerate(zip(chosen, value, strict=True)))

    return read_sequence


def _mapping(kinds: tuple[Any, ...], strict: bool) -> _Reader:
    key_reader, value_reader = (_reader(kind, strict) for kind in kinds)

    def read_mapping(value: Any, where: str) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise _refuse(where, "an object", value)
        return {key_reader(key, f"a name in {where}"): value_reader(v, f"{where}.{key}") for key, v in value.items()}

    return read_mapping


def _object(kind: Any, required: Iterable[str], strict: bool) -> _Reader:
    hints = typing.get_type_hints(kind, include_extras=True)
    readers = {name: _reader(hint, strict) for name, hint in hints.items()}

    def read_object(value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise _refuse(where, "an object", value)
        missing = sorted(set(required) - value.keys())
        if missing:
            raise MalformedError(f"{where} should have the entry {missing[0]!r} and has not")
        unknown = sorted(str(key) for key in value if key not in readers)
        if strict and unknown:
            raise MalformedError(f"{where} has the unknown entry {unknown[0]!r}")
        return kind(**{name: readers[name](value[name], f"{where}.{name}") for name in readers if name in value})

    return read_object
