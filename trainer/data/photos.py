"""Photos with tags, wherever they lie: folders, lists, pairs, shards, and mixtures of those."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from seesr_core.errors import DataError, ImageError, ResourceError
from seesr_core.formats.schema import MalformedError, Whole, Within, parse_json, read
from seesr_core.pictures.opening import open_picture
from seesr_core.runtime.files import read_text

from ..engine.settings import read_toml
from .mixture import Source
from .shards import Sample, Span, expand, read_shards, split_tags
from .tables import Cell, find_tables, read_tables

_MOST_CAPTION = 1 << 16
MOST_LIST = 1 << 30
"""Bytes of a list."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, slots=True)
class Photo:
    """One training photo."""

    path: Path
    """Path of the photo's file."""
    tags: tuple[str, ...] = ()
    """What is known to be on it; a missing tag means unknown, not absent."""
    span: Span | Cell | None = None
    """The photo's place in a shard or a table; `path` is then its name only."""
    lr: Path | None = None
    """The degraded photo, a quarter as wide and high, where it is given and not made."""
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The line of the list that it is from, whatever else stands there."""
    source: Source | None = None
    """Source of a mixture that the photo is from."""


def read_photos(source: Path | str, *, within: tuple[Path, ...] = ()) -> list[Photo]:
    """The photos of a source, in an order that depends on it alone.

    A source is a folder of photos (recursive); a folder with HR and LR, whose pictures of one name are pairs; a
    JSON-lines list, whose lines have `file` and `lr`, relative to the list, and `tags`, the latter two optional, or
    of a photo in a shard `shard`, relative too, and its place there, `offset` and `size` in bytes;
    webdataset shards (`photos-{000..012}.tar`, a folder of .tar files, or an address that fsspec reads); parquet files,
    a folder of them, a data set on the hub (`hf://datasets/OWNER/NAME`); or a mixture
    of those, a .toml file with a table `[[source]]` for each: `data`, and optionally `weight` and `first`, the number
    of photos taken from its beginning. `within` are the mixtures that this source is part of.

    Raises:
        DataError: nothing is there, a line is not as described, or no photo was found.
    """
    name, path = str(source), Path(source)
    if name.endswith(".tar"):
        photos = _from_shards(expand(name))
    elif name.endswith(".toml"):
        photos = _from_mixture(path, within)
    elif os.path.isdir(path):
        photos = _from_folder(path)
    elif tables := find_tables(name):
        photos = _in_files(read_tables(tables))
    elif os.path.isfile(path):
        photos = [_read_line(path, number, line) for number, line in enumerate(_lines(path), 1)]
    else:
        raise DataError(
            f"{source} is no file or folder here; expected a folder of photos, a .jsonl list with one photo a line, "
            "webdataset shards (.tar) or a mixture of those (.toml)."
        )
    if not photos:
        raise DataError(f"No photos in {source}; expected at least one of {', '.join(sorted(SUFFIXES))}.")
    return photos


def _from_folder(folder: Path) -> list[Photo]:
    if (folder / "HR").is_dir() and (folder / "LR").is_dir():
        return _from_pairs(folder)
    shards = sorted(str(path) for path in folder.rglob("*.tar"))
    photos = [Photo(path, _caption(path)) for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    return photos or _from_shards(shards) or _in_files(read_tables(find_tables(str(folder))))


def _caption(path: Path) -> tuple[str, ...]:
    """The tags "a, b, c" in the text file beside a photo, `NAME.txt`; none without one.

    Raises:
        DataError: there is one that cannot be read.
    """
    caption = path.with_suffix(".txt")
    try:
        return split_tags(" ".join(read_text(caption, _MOST_CAPTION).split())) if caption.is_file() else ()
    except OSError as error:
        raise DataError(f"{caption} should hold the tags of {path.name}, 'a, b, c' ({error.strerror}).") from error


def _from_pairs(folder: Path) -> list[Photo]:
    low = {path.stem: path for path in (folder / "LR").iterdir() if path.suffix.lower() in SUFFIXES}
    high = sorted(path for path in (folder / "HR").iterdir() if path.suffix.lower() in SUFFIXES)
    lonely = sorted({path.stem for path in high} ^ low.keys())
    if lonely:
        raise DataError(f"{folder}: {', '.join(lonely[:5])} is only in one of HR and LR; remove it or add its partner.")
    return [Photo(path, lr=low[path.stem]) for path in high]


def _from_shards(shards: Sequence[str]) -> list[Photo]:
    return _in_files(read_shards(shards, SUFFIXES))


def _in_files(samples: Iterable[Sample]) -> list[Photo]:
    """Photos in larger files, each under the name of its file."""
    return [Photo(_whole_file(sample.span) / sample.name, sample.tags, sample.span) for sample in samples]


def _whole_file(span: Span | Cell) -> Path:
    return Path(span.shard if isinstance(span, Span) else span.table)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """A source of a mixture, as its file says it."""

    data: str
    weight: Annotated[float, Within(1e-9, 1e9)] | None = None
    first: Annotated[int, Within(0, 1 << 40)] | None = None


def _from_mixture(path: Path, within: tuple[Path, ...]) -> list[Photo]:
    if path.resolve() in within:
        raise DataError(f"{path} is a part of itself; take it out of the mixture.")
    try:
        tables = read(list[_Table], read_toml(path).get("source"), "source", strict=True)
    except MalformedError as error:
        raise DataError(
            f"{path} should have a table [[source]] with `data` for each source of photos, maybe with `weight` (above "
            f"0) and `first`: {error}."
        ) from error
    weighted = any(table.weight is not None for table in tables)
    photos = []
    for table in tables:
        name = table.data if "://" in table.data else path.parent / table.data
        found = read_photos(name, within=(*within, path.resolve()))[: table.first]
        if weighted and table.weight is None:
            raise DataError(f"{path}: the source {table.data} needs a weight above 0, like the others; found none.")
        source = Source(table.data, table.weight) if table.weight is not None else None
        photos += [dataclasses.replace(photo, source=source) for photo in found]
    return photos


def _lines(source: Path) -> list[str]:
    try:
        return read_text(source, MOST_LIST).splitlines()
    except OSError as error:
        raise DataError(
            f"{source} is no list of photos: expected a folder or UTF-8 text, found {error.strerror or error}."
        ) from error


@dataclass(frozen=True, slots=True)
class _Line:
    """A photo in a list."""

    file: str
    lr: str | None = None
    tags: list[str] | None = None
    shard: str | None = None
    offset: Whole | None = None
    size: Annotated[int, Within(1, 1 << 30)] | None = None
    table: str | None = None
    group: Whole | None = None
    row: Whole | None = None
    column: str | None = None


def _read_line(source: Path, number: int, line: str) -> Photo:
    try:
        found = parse_json(line)
        entry = read(_Line, found)
        span = _span(source, entry)
    except MalformedError as error:
        raise DataError(
            f"{source}:{number} should be a JSON object with the key 'file' and maybe a list 'tags', "
            f"this is {line[:60]!r} ({error})."
        ) from error
    path, tags = source.parent / entry.file, entry.tags or []
    lr = source.parent / entry.lr if entry.lr else None
    for named in filter(None, (lr,) if span else (path, lr)):
        if not os.path.isfile(named):
            raise DataError(
                f"{source}:{number} names {named.name}, but {named} does not exist; put it there or drop the line."
            )
    return Photo(path, tuple(tags), span, lr, found)


def _span(source: Path, entry: _Line) -> Span | Cell | None:
    """The place in a shard or a table that a line names, if it does."""
    if entry.table is not None:
        if entry.group is None or entry.row is None or entry.column is None:
            raise MalformedError("a photo in a table needs `group`, `row` and `column`")
        table = entry.table if "://" in entry.table else str(source.parent / entry.table)
        return Cell(table, entry.group, entry.row, entry.column)
    if entry.shard is None:
        return None
    if entry.offset is None or entry.size is None:
        raise MalformedError("a photo in a shard needs `offset` and `size`")
    shard = entry.shard if "://" in entry.shard else str(source.parent / entry.shard)
    return Span(shard, entry.offset, entry.size)


def load_rgb(path: Path) -> Tensor:
    """A photo as uint8 (3, H, W), EXIF rotation applied.

    Raises:
        DataError: it cannot be read.
    """
    return load_photo(Photo(path))


def load_photo(photo: Photo) -> Tensor:
    """Read a photo as `load_rgb` does, from wherever it lies."""
    with opened(photo) as image:
        array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


@contextlib.contextmanager
def opened(photo: Photo) -> Iterator[Image.Image]:
    """The picture file, its header read.

    Raises:
        DataError: it is no picture, or within the block cannot be decoded.
    """
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(photo.span.open()) if photo.span else None
            yield stack.enter_context(open_picture(photo.path, stream))
    except (ImageError, ResourceError, OSError) as error:
        raise DataError(
            f"{photo.path} cannot be read as an image ({error}); remove it from the training data."
        ) from error
