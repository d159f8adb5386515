"""Lists of photos, and the crops that are drawn from them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr_core.errors import DataError
from trainer.data.crops import Crops
from trainer.data.fingerprints import same_photos
from trainer.data.order import Stream, seeded
from trainer.data.photos import Photo, load_rgb, read_photos


def write_photo(path: Path, size: tuple[int, int] = (24, 20), seed: int = 0) -> Photo:
    """A photo of noise, `size` wide and high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return Photo(path)


@pytest.fixture
def photos(tmp_path: Path) -> list[Photo]:
    return [write_photo(tmp_path / f"{index}.png", (24 + index, 20), seed=index) for index in range(5)]


def test_a_folder_is_read_recursively_in_order_and_only_its_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [photo.path for photo in read_photos(tmp_path)] == [tmp_path / "a" / "z.JPG", tmp_path / "b.png"]


def test_a_list_names_photos_relative_to_itself_with_tags(tmp_path: Path) -> None:
    write_photo(tmp_path / "photos" / "x.png")
    lines = [{"file": "photos/x.png", "tags": ["cat", "sofa"]}, {"file": "photos/x.png", "tags": None}]
    source = tmp_path / "list.jsonl"
    source.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    assert [photo.tags for photo in read_photos(source)] == [("cat", "sofa"), ()]
    assert read_photos(source)[0].path.is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file": "x.png"', r"list\.jsonl:2 should be a JSON object with the key 'file'"),
        ('{"tags": []}', r"list\.jsonl:2 should be a JSON object with the key 'file'"),
        ("[1, 2]", r"list\.jsonl:2 should be a JSON object with the key 'file'"),
        ('{"file": 3}', r"list\.jsonl:2 should be a JSON object with the key 'file'"),
        ('{"file": "x.png", "tags": "cat"}', r"list\.jsonl:2 should be .* and maybe a list 'tags'"),
        ('{"file": "x.png", "tags": [1]}', r"list\.jsonl:2 should be .* and maybe a list 'tags'"),
        ('{"file": "gone.png"}', r"list\.jsonl:2 names gone\.png, but .* does not exist"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    write_photo(tmp_path / "x.png")
    source = tmp_path / "list.jsonl"
    source.write_text('{"file": "x.png"}\n' + line, "utf-8")
    with pytest.raises(DataError, match=message):
        read_photos(source)


def test_missing_and_empty_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no file or folder here; expected a folder of photos"):
        read_photos(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"No photos in .*; expected at least one of \.bmp"):
        read_photos(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"x\.bin is no list of photos: expected a folder or UTF-8 text"):
        read_photos(tmp_path / "x.bin")


def test_rotation_is_applied_and_every_mode_becomes_rgb(tmp_path: Path) -> None:
    picture = Image.new("L", (6, 4), 200)
    exif = Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "x.png", exif=exif)
    loaded = load_rgb(tmp_path / "x.png")
    assert loaded.shape == (3, 6, 4)
    assert loaded.dtype == torch.uint8
    assert loaded.unique().tolist() == [200]


def test_the_same_numbers_give_the_same_stream_and_others_another() -> None:
    tuples = [(0, 1), (1, 0), (0, 1, 0), (0, 2), (-1, 1)]
    streams = [torch.rand(4, generator=seeded(*numbers)).tolist() for numbers in tuples]
    assert streams == [torch.rand(4, generator=seeded(*numbers)).tolist() for numbers in tuples]
    assert len({tuple(stream) for stream in streams}) == len(tuples)


def test_the_draws_of_one_run_have_streams_of_their_own_with_the_numbers_that_runs_were_begun_with() -> None:
    table = {name: number for name, number in vars(Stream).items() if name.isupper()}
    for stage in ("STAGE1", "STAGE2"):
        others = ("STAGE1", "STAGE2", "NANO", "SEGSR", "DISTILL")
        drawn = [n for name, n in table.items() if name.startswith(stage) or not name.startswith(others)]
        assert len(set(drawn)) == len(drawn)
    common = (Stream.EPOCH, Stream.CROP, Stream.MIXTURE, Stream.FIXED_CROP, Stream.DROPOUT)
    first = (Stream.STAGE1_DEGRADATION, Stream.STAGE1_ADAPTER, Stream.STAGE1_SHOWN)
    second = (Stream.STAGE2_WEIGHTS, Stream.STAGE2_DEGRADATION, Stream.POSTERIOR, Stream.DENOISING, Stream.VALIDATION)
    assert (common, first, second) == ((1, 2, 15, 17, 4), (3, 5, 6), (6, 7, 8, 10, 14))


def test_a_batch_depends_on_its_number_alone(photos: list[Photo]) -> None:
    one, other = (Crops(photos, size=8, min_scale=0.5, seed=3) for _ in range(2))
    for step in range(4):
        one.batch(step, 2)
    crops, indices = other.batch(3, 2)
    assert crops.shape == (2, 3, 8, 8)
    assert crops.dtype == torch.uint8
    assert torch.equal(one.batch(3, 2)[0], crops)
    assert one.batch(3, 2)[1] == indices
    assert not torch.equal(one.batch(2, 2)[0], crops)
    assert not torch.equal(Crops(photos, size=8, min_scale=0.5, seed=4).batch(3, 2)[0], crops)


def test_photos_beyond_the_memory_are_read_when_drawn(photos: list[Photo]) -> None:
    kept, reread = Crops(photos, size=8, seed=3), Crops(photos, size=8, seed=3, memory=2000)
    assert torch.equal(kept.batch(0, 10)[0], reread.batch(0, 10)[0])
    photos[4].path.write_bytes(b"")
    assert kept.image(4).shape == (3, 20, 28)
    with pytest.raises(DataError, match=r"4\.png cannot be read as an image"):
        reread.image(4)


def test_every_photo_is_drawn_once_an_epoch_in_a_new_order(photos: list[Photo]) -> None:
    crops = Crops(photos, size=8)
    epochs = [[crops.index(epoch * 5 + position) for position in range(5)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_crops_are_cut_from_the_photo_or_its_mirror_image(photos: list[Photo]) -> None:
    crops = Crops(photos[:1], size=8)
    windows = crops.image(0).unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    found = [(windows == crop).flatten(1).all(1).any().item() for crop in crops.batch(0, 12)[0]]
    mirrored = [(windows == crop.flip(2)).flatten(1).all(1).any().item() for crop in crops.batch(0, 12)[0]]
    assert all(a != b for a, b in zip(found, mirrored, strict=True))
    assert any(found)
    assert any(mirrored)


def test_small_photos_are_enlarged_to_the_crop(tmp_path: Path) -> None:
    crops = Crops([write_photo(tmp_path / "x.png", (5, 9))], size=16)
    assert crops.batch(0, 3)[0].shape == (3, 3, 16, 16)


def test_a_scale_of_0_reaches_from_the_whole_short_side_to_full_size(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 80).astype(np.uint8)[None, :, None], (80, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "x.png")
    crops = Crops([Photo(tmp_path / "x.png")], size=20, min_scale=0.0).batch(0, 24)[0]
    spans = [int(crop.max()) - int(crop.min()) for crop in crops]
    assert max(spans) > 240
    assert min(spans) < 120


def test_one_broken_photo_in_many_is_left_out_and_named(photos: list[Photo], caplog: pytest.LogCaptureFixture) -> None:
    broken = photos[0].path.with_name("broken.png")
    broken.write_bytes(photos[0].path.read_bytes()[:60])
    with caplog.at_level(logging.WARNING):
        crops = Crops([*photos, *photos, Photo(broken)], size=8)
    assert len(crops) == 10
    assert "broken.png cannot be read as an image" in caplog.text
    with pytest.raises(DataError, match="Only 1 of 2 photos can be used"):
        Crops([photos[0], Photo(broken)], size=8)


def test_lists_are_told_apart_by_names_tags_and_order(photos: list[Photo]) -> None:
    moved = [Photo(Path("elsewhere") / photo.path.name) for photo in photos]
    tagged = [*photos[:-1], Photo(photos[-1].path, ("cat",))]
    assert same_photos(photos) == same_photos(moved)
    assert len({same_photos(p) for p in (photos, photos[:-1], photos[::-1], tagged)}) == 4
