"""Where photos come from: shards, mixtures, pairs; what is skipped; and threads that change nothing."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import DataError
from trainer.data.crops import Crops, write_skipped
from trainer.data.mixture import CYCLE, WeightedOrder, shares
from trainer.data.photos import load_photo, read_photos
from trainer.data.shards import expand


def png(seed: int, size: tuple[int, int] = (40, 36)) -> bytes:
    """A photo of noise as a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def shard(path: Path, first: int, count: int) -> bytes:
    """A webdataset shard of photos with tags, also written to `path`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(first, first + count):
            tags = json.dumps({"tags": [f"tag {number}"]}).encode() if number % 2 else f"tag {number}, x".encode()
            for suffix, data in ((".png", png(number)), (".json" if number % 2 else ".txt", tags)):
                member = tarfile.TarInfo(f"{number:04d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path.write_bytes(stream.getvalue())
    return stream.getvalue()


def test_braces_stand_for_numbers() -> None:
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("a.tar") == ["a.tar"]


def test_photos_in_shards_are_those_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "plain").mkdir()
    shard(tmp_path / "shards" / "s-0.tar", 0, 3)
    shard(tmp_path / "shards" / "s-1.tar", 3, 2)
    for number in range(5):
        (tmp_path / "plain" / f"{number:04d}.png").write_bytes(png(number))
    packed, plain = read_photos(str(tmp_path / "shards" / "s-{0..1}.tar")), read_photos(tmp_path / "plain")
    assert packed == read_photos(tmp_path / "shards")
    assert [photo.path.name for photo in packed] == [photo.path.name for photo in plain]
    assert [photo.tags for photo in packed[:2]] == [("tag 0", "x"), ("tag 1",)]
    one, other = (Crops(photos, size=16, seed=3, memory=0) for photos in (packed, plain))
    assert torch.equal(one.batch(2, 4)[0], other.batch(2, 4)[0])


def test_shards_are_read_from_an_address(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://photos/s.tar", "wb") as file:
        file.write(shard(tmp_path / "s.tar", 0, 2))
    photos = read_photos("memory://photos/s.tar")
    assert torch.equal(load_photo(photos[1]), load_photo(read_photos(str(tmp_path / "s.tar"))[1]))


def test_of_a_corrupt_shard_what_comes_before_the_damage_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = shard(tmp_path / "s.tar", 0, 4)
    (tmp_path / "s.tar").write_bytes(whole[: len(whole) // 2])
    photos = read_photos(str(tmp_path / "s.tar"))
    assert 1 <= len(photos) < 4
    assert "s.tar is damaged" in caplog.text
    names = [str(tmp_path / f"s-{number}.tar") for number in range(2)]
    for name in names:
        Path(name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="2 of 2 shards are damaged"):
        read_photos(str(tmp_path / "s-{0..1}.tar"))
    with pytest.raises(DataError, match=r"The shard .*gone\.tar cannot be read"):
        read_photos(str(tmp_path / "gone.tar"))


def mixture(tmp_path: Path, text: str) -> Path:
    for name, count in (("a", 3), ("b", 20)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{name}{number:02d}.png").write_bytes(png(number))
    (tmp_path / "mix.toml").write_text(text, "utf-8")
    return tmp_path / "mix.toml"


def test_a_mixture_without_weights_is_all_its_photos(tmp_path: Path) -> None:
    source = mixture(tmp_path, '[[source]]\ndata = "a"\n[[source]]\ndata = "b"\nfirst = 2\n')
    assert [photo.path.name for photo in read_photos(source)] == ["a00.png", "a01.png", "a02.png", "b00.png", "b01.png"]


def test_a_mixture_with_weights_draws_each_source_by_its_share(tmp_path: Path) -> None:
    text = '[[source]]\ndata = "a"\nweight = 3\n[[source]]\ndata = "b"\nweight = 1\n'
    crops = Crops(read_photos(mixture(tmp_path, text)), size=8, seed=1)
    drawn = [crops.photos[crops.index(number)].path.name for number in range(CYCLE)]
    assert Counter(name[0] for name in drawn) == {"a": 750, "b": 250}
    assert set(Counter(name for name in drawn if name[0] == "a").values()) == {250}
    assert len({name for name in drawn[:100] if name[0] == "b"}) > 15
    again = Crops(read_photos(tmp_path / "mix.toml"), size=8, seed=1)
    assert [again.photos[again.index(n)].path.name for n in (999, 5)] == [drawn[999], drawn[5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('source = "a"', "should have a table"),
        ("[[source]]\nweight = 1.0\n", "should have a table"),
        ('[[source]]\ndata = "a"\nweight = 1\n[[source]]\ndata = "b"\n', "the source b needs a weight above 0"),
    ],
)
def test_a_mistake_in_a_mixture_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_photos(mixture(tmp_path, text))


def test_shares_are_whole_and_complete() -> None:
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([84_991, 10_000], 1000) == [895, 105]
    order = WeightedOrder([[5, 6], [7]], [1, 1], seed=2)
    assert Counter(order(n) for n in range(CYCLE, 2 * CYCLE)) == {5: 250, 6: 250, 7: 500}


def write_pairs(folder: Path, count: int = 3, side: int = 40) -> Path:
    """LR pixels and, as HR, each of them four times as large."""
    for kind in ("HR", "LR"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        lr = np.random.default_rng(number).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
        Image.fromarray(lr).save(folder / "LR" / f"{number}.png")
        Image.fromarray(lr.repeat(4, 0).repeat(4, 1)).save(folder / "HR" / f"{number}.png")
    return folder


def test_pairs_are_cropped_at_the_same_place(tmp_path: Path) -> None:
    crops = Crops(read_photos(write_pairs(tmp_path)), size=16, seed=4)
    assert crops.paired
    hr, lr, photos = crops.pairs(1, 6)
    assert (hr.shape, lr.shape, len(photos)) == ((6, 3, 16, 16), (6, 3, 4, 4), 6)
    assert torch.equal(hr[:, :, ::4, ::4], lr)
    assert torch.equal(torch.cat([crops.pairs(n, 3)[0] for n in (2, 3)]), hr)


def test_pairs_in_a_list_and_pairs_that_do_not_fit(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    lines = [json.dumps({"file": f"HR/{n}.png", "lr": f"LR/{n}.png", "tags": ["x"]}) for n in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines), "utf-8")
    first = read_photos(tmp_path / "list.jsonl")[0]
    assert (first.lr, first.tags) == (
        tmp_path / "LR" / "0.png",
        ("x",),
    )
    Image.new("RGB", (9, 10)).save(tmp_path / "LR" / "1.png")
    with pytest.raises(DataError, match=r"expected 4 times those of .*1\.png \(9×10\)"):
        Crops(read_photos(tmp_path), size=16)
    (tmp_path / "LR" / "1.png").unlink()
    with pytest.raises(DataError, match="1 is only in one of HR and LR"):
        read_photos(tmp_path)


def test_tiny_and_grey_photos_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(28):
        (tmp_path / "photos" / f"{number:02d}.png").write_bytes(png(number))
    (tmp_path / "photos" / "tiny.png").write_bytes(png(1, (30, 99)))
    Image.new("RGB", (50, 50), (7, 7, 7)).save(tmp_path / "photos" / "grey.png")
    photos = read_photos(tmp_path / "photos")
    crops = Crops(photos, size=16, smallest=32, skip_grey=True)
    assert len(crops) == 28
    write_skipped(crops, tmp_path)
    listed = (tmp_path / "skipped.txt").read_text("utf-8").splitlines()
    assert [line.split("photos/")[1].split()[0] for line in listed] == ["grey.png", "tiny.png"]
    assert "has no colour" in listed[0]
    assert "30×99 pixels, smaller than 32" in listed[1]
    assert len(Crops(photos, size=16, smallest=32, memory=0)) == 29
    with pytest.raises(DataError, match="Only 0 of 30 photos can be used"):
        Crops(photos, size=16, smallest=128)


@pytest.mark.parametrize("stride", [1, 3])
def test_threads_change_no_batch(tmp_path: Path, stride: int) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    photos = read_photos(tmp_path)
    alone, helped = Crops(photos, size=16, seed=2), Crops(photos, size=16, seed=2, workers=2, stride=stride, memory=0)
    for step in (0, 3, 6, 0, 9):
        assert torch.equal(alone.batch(step, 2)[0], helped.batch(step, 2)[0])
        assert alone.batch(step, 2)[1] == helped.batch(step, 2)[1]


def test_an_error_in_a_thread_is_told(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    crops = Crops(read_photos(tmp_path), size=16, workers=1, memory=0)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        crops.batch(0, 1)
