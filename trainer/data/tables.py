"""Photos in tables: parquet files, Arrow folders as the package datasets saves them, and data sets on the hub.

A table is indexed once by its footer; photos are then read by their place, so that the order of a run depends on its
seed alone. Of a data set on the hub (`hf://datasets/OWNER/NAME`) nothing but the read parts is fetched.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from seesr_core.errors import DataError

from .shards import Sample, open_source, split_tags

HUB = "hf://datasets/"
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
"""Names of the column with the photo's bytes, the first that is there."""
WORDS = ("tags", "text", "caption", "txt")
"""Names of the column with its tags: a list, or one text "a, b, c"."""
_GROUPS_KEPT = 4
"""Groups of rows that are kept in memory; a photo is read with its whole group."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Where a photo lies in a table."""

    table: str
    """Path or address of the file."""
    group: int
    """Number of the row group in the file."""
    row: int
    """Number of the row in the group."""
    column: str
    """Name of the column."""

    def open(self) -> IO[bytes]:
        """The photo's bytes.

        Raises:
            OSError: the table is gone, or there is nothing at that place.
        """
        try:
            value = _column(self.table, self.group, self.column)[self.row].as_py()
        except (IndexError, KeyError, ValueError) as error:
            raise OSError(f"{self.table} has no row {self.row} in group {self.group} ({error})") from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError(f"{self.table} has no bytes in row {self.row} of group {self.group}")
        return io.BytesIO(data)


def find_tables(source: str) -> list[str]:
    """The tables that a source names: a `.parquet` file, the `.parquet` and `.arrow` files of a folder, or those of a
    data set on the hub; none if it is something else.

    Raises:
        DataError: LMDB, which is not read; a data set on the hub that is not there.
    """
    if source.startswith(HUB):
        return _on_hub(source)
    path = Path(source)
    if path.suffix == ".lmdb" or os.path.exists(path / "data.mdb"):
        raise DataError(
            f"{source} is an LMDB, whose layout differs from author to author and is not read: write its photos into a "
            "folder, or into webdataset shards (.tar) or parquet files with a column `image`."
        )
    if source.endswith(".parquet"):
        return [source]
    if not os.path.isdir(path):
        return []
    return sorted(str(found) for suffix in ("parquet", "arrow") for found in path.rglob(f"*.{suffix}"))


def _on_hub(source: str) -> list[str]:
    """Parquet files of a data set, those that the hub converts it to where it has none itself."""
    try:
        import fsspec

        files = fsspec.filesystem("hf")
        name = source.removeprefix("hf://").rstrip("/")
        owner = "/".join(name.split("/")[:3])
        converted = f"{owner}@refs%2Fconvert%2Fparquet{name.removeprefix(owner)}"
        for place in (name, converted):
            if found := sorted(files.glob(f"{place}/**/*.parquet")):
                return [f"hf://{file}" for file in found]
    except (ImportError, ValueError) as error:
        raise DataError(f"Reading {source} needs `pip install 'comfyui-seesr[datasets]'` ({error}).") from error
    except OSError as error:
        raise DataError(f"{source} cannot be reached ({error}); correct its name, or log in to the hub.") from error
    raise DataError(f"{source} has no parquet files, and the hub made none of it; download it and name its folder.")


def read_tables(tables: Iterable[str]) -> Iterator[Sample]:
    """The photos of all tables in order.

    Raises:
        DataError: a file is no such table, or has no column of photos.
    """
    for table in tables:
        try:
            yield from _samples(table)
        except OSError as error:
            raise DataError(f"The table {table} cannot be read ({error}); correct the name or restore it.") from error


def _samples(table: str) -> Iterator[Sample]:
    names = _names(table)
    image = next((name for name in IMAGES if name in names), None)
    words = next((name for name in WORDS if name in names), None)
    if image is None:
        raise DataError(
            f"{table} has the columns {', '.join(names)}; expected one of {', '.join(IMAGES)} with a photo's bytes, "
            f"and maybe one of {', '.join(WORDS)} with its tags."
        )
    for group, count in enumerate(_groups(table)):
        texts = _column(table, group, words).to_pylist() if words else [None] * count
        for row, text in enumerate(texts):
            name = f"{Path(table).stem}-{group:04d}-{row:05d}.{image if image in ('png', 'webp') else 'jpg'}"
            yield Sample(name, Cell(table, group, row, image), _words(text))


def _words(found: Any) -> tuple[str, ...]:
    return split_tags(found) if isinstance(found, str) else tuple(str(word) for word in found or ())


def _names(table: str) -> list[str]:
    names: list[str] = _arrow(table).column_names if table.endswith(".arrow") else _parquet(table).schema_arrow.names
    return names


def _groups(table: str) -> list[int]:
    """Rows of each group; an Arrow file, which is mapped into memory, is one group."""
    if table.endswith(".arrow"):
        return [_arrow(table).num_rows]
    file = _parquet(table)
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


@functools.lru_cache(maxsize=_GROUPS_KEPT)
def _column(table: str, group: int, column: str) -> Any:
    """A column of a group of rows."""
    if table.endswith(".arrow"):
        return _arrow(table).column(column)
    return _parquet(table).read_row_group(group, columns=[column]).column(column)


def _parquet(table: str) -> Any:
    return _opened(table, lambda: _package("pyarrow.parquet").ParquetFile(open_source(table)))


@functools.lru_cache(maxsize=64)
def _arrow(table: str) -> Any:
    pa = _package("pyarrow")
    return _opened(table, lambda: pa.ipc.open_stream(pa.memory_map(table)).read_all())


def _opened(table: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except ValueError as error:  # pyarrow's own errors are of this kind
        raise DataError(f"{table} is no table, or it is damaged ({error}); restore it.") from error


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError("Tables of photos need pyarrow: `pip install 'comfyui-seesr[datasets]'`.") from error
