"""Photos in webdataset shards: tar files, local or at any address that fsspec can read.

A shard is indexed once, by the headers of its files; photos are then read by their place in it. So any photo can be
drawn at any time, and the order of a run depends on nothing but its seed.
"""

from __future__ import annotations

import io
import logging
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from seesr_core.errors import DataError
from seesr_core.formats.schema import parse_json, read

log = logging.getLogger(__name__)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_DAMAGED = 0.1
_MOST_SHARDS = 100_000
_MOST_TAGS = 1 << 20
"""Bytes of a photo's tags."""
_MOST_PHOTO = 1 << 30
"""Bytes of a photo's file."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a file lies in a shard."""

    shard: str
    """Path or address of the shard."""
    offset: int
    """Number of the file's first byte in the shard."""
    size: int
    """Size of the file in bytes."""

    def open(self) -> IO[bytes]:
        """The file's bytes.

        Raises:
            OSError: the shard is gone, or shorter than it was.
        """
        with open_source(self.shard) as shard:
            shard.seek(self.offset)
            data = shard.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.shard} ends after {self.offset + len(data)} bytes")
        return io.BytesIO(data)


@dataclass(frozen=True, slots=True)
class Sample:
    """The files of one key in a shard."""

    name: str
    """File name of the photo."""
    span: Any
    """Place of the photo in the shard, or in a table."""
    tags: tuple[str, ...]
    """Tags from `key.json` (its list `tags`) or `key.txt` ("a, b, c")."""


def expand(source: str) -> list[str]:
    """`photos-{000..012}.tar` as thirteen names; a name without braces as itself."""
    ranges = _RANGE.findall(source)
    if any(len(last) > 9 for _, last in ranges) or math.prod(int(b) - int(a) + 1 for a, b in ranges) > _MOST_SHARDS:
        raise DataError(f"{source[:200]} stands for more than {_MOST_SHARDS:,} shards; correct the numbers in braces.")
    found = _RANGE.search(source)
    if not found:
        return [source]
    first, last = found.groups()
    names = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [name for n in names for name in expand(source[: found.start()] + n + source[found.end() :])]


def read_shards(shards: Sequence[str], suffixes: set[str]) -> Iterator[Sample]:
    """The samples of all shards in order; of a damaged shard those before the damage.

    Raises:
        DataError: a shard cannot be opened, or more than a tenth of them are damaged.
    """
    damaged = []
    for shard in shards:
        try:
            yield from _samples(shard, suffixes)
        except (tarfile.TarError, EOFError, ValueError, ArithmeticError, MemoryError) as error:
            log.warning("shard %s is damaged (%s); what comes before is used", shard, error)
            damaged.append(shard)
        except OSError as error:
            raise DataError(f"The shard {shard} cannot be read ({error}); correct the name or restore it.") from error
    if len(damaged) > _MOST_DAMAGED * len(shards) and len(shards) > 1:
        raise DataError(f"{len(damaged)} of {len(shards)} shards are damaged ({', '.join(damaged[:5])}); restore them.")


def _samples(shard: str, suffixes: set[str]) -> Iterator[Sample]:
    """The photos of one shard with their tags; the files of a key follow each other."""
    key = ""
    photo: tuple[str, Span] | None = None
    tags: tuple[str, ...] = ()
    with open_source(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            path = PurePosixPath(member.name)
            if member.size < 0 or member.size > _MOST_PHOTO:
                raise ValueError(f"{member.name[:60]!r} claims {member.size:,} bytes")
            stem, suffix = str(path.parent / path.name.split(".")[0]), path.suffix.lower()
            if stem != key:
                if photo is not None:
                    yield Sample(*photo, tags)
                key, photo, tags = stem, None, ()
            if suffix in suffixes:
                photo = (path.name, Span(shard, member.offset_data, member.size))
            elif suffix in (".json", ".txt"):
                data = cast(IO[bytes], tar.extractfile(member)).read(_MOST_TAGS)
                tags = _tags(data, suffix, f"{shard}: {member.name[:60]}")
        if photo is not None:
            yield Sample(*photo, tags)


@dataclass(frozen=True, slots=True)
class _Tags:
    """What is taken of a photo's JSON file."""

    tags: list[str]


def _tags(data: bytes, suffix: str, name: str) -> tuple[str, ...]:
    try:
        if suffix != ".json":
            return split_tags(data.decode("utf-8"))
        return tuple(tag.strip() for tag in read(_Tags, parse_json(data)).tags if tag.strip())
    except ValueError as error:
        raise DataError(f"{name} should hold the tags of a photo, {{'tags': […]}} or 'a, b, c' ({error}).") from error


def split_tags(text: str) -> tuple[str, ...]:
    """The tags of a text "a, b, c"."""
    return tuple(tag.strip() for tag in text.split(",") if tag.strip())


def open_source(source: str) -> IO[bytes]:
    """A local file, or one at an address such as `s3://…`, `https://…`.

    Raises:
        DataError: an address without fsspec, or of a kind that it does not know. OSError: it cannot be opened.
    """
    if "://" not in source:
        return Path(source).open("rb")
    try:
        import fsspec

        return cast(IO[bytes], fsspec.open(source, "rb").open())
    except ImportError as error:
        raise DataError(
            f"Reading {source} needs the package {error.name or 'fsspec'}: `pip install fsspec {error.name or ''}`."
        ) from error
