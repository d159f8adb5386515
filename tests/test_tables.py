"""Photos in parquet and Arrow files, on the hub, and with a text file beside them; LMDB is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from seesr_core.errors import DataError
from trainer import tag
from trainer.data.photos import load_photo, read_photos
from trainer.data.tables import find_tables

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")


def picture(number: int) -> Image.Image:
    """A photo of noise."""
    draws = torch.Generator().manual_seed(number)
    return Image.fromarray(torch.randint(0, 256, (24, 20, 3), dtype=torch.uint8, generator=draws).numpy())


def encoded(number: int) -> bytes:
    with io.BytesIO() as buffer:
        picture(number).save(buffer, "PNG")
        return buffer.getvalue()


def write_table(path: Path, numbers: range, **columns: Any) -> Path:
    """A parquet file as the package datasets writes it, two rows a group."""
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=2)
    return path


def test_photos_of_parquet_files_come_in_order_with_their_words(tmp_path: Path) -> None:
    write_table(tmp_path / "b.parquet", range(3, 5), text=["sky", ""])
    write_table(tmp_path / "a.parquet", range(3), text=["cat, dog", "sea , ", "tree"])
    photos = read_photos(tmp_path)
    assert [photo.tags for photo in photos] == [("cat", "dog"), ("sea",), ("tree",), ("sky",), ()]
    assert len({photo.path for photo in photos}) == 5
    for number in (4, 0, 2, 1, 3):
        expected = torch.tensor(list(picture(number).tobytes()), dtype=torch.uint8).view(24, 20, 3).permute(2, 0, 1)
        assert torch.equal(load_photo(photos[number]), expected)


def test_lists_of_tags_and_plain_bytes_are_read_too(tmp_path: Path) -> None:
    table = pa.table({"png": [encoded(0)], "tags": [["cat", "dog"]], "width": [20]})
    pq.write_table(table, tmp_path / "photos.parquet")
    (photo,) = read_photos(tmp_path / "photos.parquet")
    assert photo.tags == ("cat", "dog")
    assert load_photo(photo).shape == (3, 24, 20)


def test_a_folder_that_the_package_datasets_saved_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    made = datasets.Dataset.from_dict({"image": [picture(0), picture(1)], "caption": ["a, b", "c"]})
    made = made.cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    photos = read_photos(tmp_path / "saved")
    assert [photo.tags for photo in photos] == [("a", "b"), ("c",)]
    assert load_photo(photos[1]).shape == (3, 24, 20)


class Hub(LocalFileSystem):
    """The hub's file system, its files in a folder here."""

    protocol = "hf"
    root = ""
    read: list[str] = []  # noqa: RUF012 - shared by the instances that fsspec makes

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("hf://")

    def glob(self, path: str, **_: Any) -> list[str]:
        return [str(found.relative_to(self.root)) for found in Path(self.root).glob(path)]

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, **more: Any) -> Any:
        self.read.append(path)
        return super()._open(str(Path(self.root) / path), mode, block_size, **more)

    def info(self, path: str, **more: Any) -> Any:
        return super().info(str(Path(self.root) / path), **more)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the hub."""
    monkeypatch.setattr(Hub, "root", str(tmp_path))
    monkeypatch.setattr(Hub, "read", [])
    fsspec.register_implementation("hf", Hub, clobber=True)
    return tmp_path / "datasets"


def test_a_data_set_on_the_hub_is_read_by_its_name(hub: Path) -> None:
    write_table(hub / "me" / "photos" / "data" / "train.parquet", range(2), text=["cat", "dog"])
    photos = read_photos("hf://datasets/me/photos")
    assert [photo.tags for photo in photos] == [("cat",), ("dog",)]
    assert load_photo(photos[1]).shape == (3, 24, 20)
    assert set(Hub.read) == {"datasets/me/photos/data/train.parquet"}


def test_a_data_set_without_tables_is_read_as_the_hub_converts_it(hub: Path) -> None:
    write_table(hub / "me" / "photos@refs%2Fconvert%2Fparquet" / "default" / "0.parquet", range(1))
    assert len(read_photos("hf://datasets/me/photos")) == 1
    with pytest.raises(DataError, match="has no parquet files"):
        read_photos("hf://datasets/me/others")


def test_photos_of_tables_keep_their_place_in_a_list(tmp_path: Path) -> None:
    write_table(tmp_path / "t" / "photos.parquet", range(3))
    photos = read_photos(tmp_path / "t")
    lines = [{**tag._place(photo, tmp_path / "list.jsonl"), "tags": ["x"]} for photo in photos]
    assert lines[2] == {
        "file": photos[2].path.name,
        "table": "t/photos.parquet",
        "group": 1,
        "row": 0,
        "column": "image",
        "tags": ["x"],
    }
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    again = read_photos(tmp_path / "list.jsonl")
    assert all(torch.equal(load_photo(a), load_photo(b)) for a, b in zip(again, photos, strict=True))


def test_what_is_no_table_of_photos_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "photos.parquet")
    with pytest.raises(DataError, match="has the columns a, b; expected one of image, img"):
        read_photos(tmp_path / "photos.parquet")
    (tmp_path / "photos.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="is no table, or it is damaged"):
        read_photos(tmp_path / "photos.parquet")
    with pytest.raises(DataError, match=r"none\.parquet cannot be read"):
        read_photos(tmp_path / "none.parquet")
    pq.write_table(pa.table({"image": [b"no photo"]}), tmp_path / "photos.parquet")
    (photo,) = read_photos(tmp_path / "photos.parquet")
    with pytest.raises(DataError, match="cannot be read as an image"):
        load_photo(photo)


@pytest.mark.parametrize("name", ["photos", "photos.lmdb"])
def test_lmdb_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "data.mdb").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"is an LMDB, .* webdataset shards"):
        find_tables(str(tmp_path / name))


def test_a_text_beside_a_photo_has_its_tags(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(0).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("cat, a red\nball ,\n", "utf-8")
    assert [photo.tags for photo in read_photos(tmp_path)] == [("cat", "a red ball"), ()]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"b\.txt should hold the tags of b\.png"):
        read_photos(tmp_path)
