"""Tagging of photos: the list, going on after an interruption, and several processes."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from seesr_core.dape import Vocabulary
from seesr_core.errors import DataError
from seesr_core.formats.ram import write_dape
from trainer import tag
from trainer.data.crops import Crops
from trainer.data.pairs import what_lr_is
from trainer.data.photos import Photo, load_photo, read_photos

from .stage2_nets import write_photos
from .tiny_model import tagger


@pytest.fixture
def options(tmp_path: Path) -> tag.TagCommand:
    (tmp_path / "photos").mkdir()
    write_photos(tmp_path / "photos", 5)
    dape, vocabulary = tagger()
    generous = Vocabulary(tags=vocabulary.tags, thresholds=torch.full((len(vocabulary),), 0.05))
    write_dape(tmp_path / "tagger.safetensors", dape, generous)
    folder = tmp_path / "photos"
    return tag.TagCommand(
        tagger=tmp_path / "tagger.safetensors", data=str(folder), out=tmp_path / "t.jsonl", batch_size=2
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def test_every_photo_gets_its_tags_and_the_list_is_read_by_the_stages(options: tag.TagCommand) -> None:
    assert tag.tag(options) == options.out
    found = lines(options.out)
    assert [line["file"] for line in found] == [f"photos/{number}.png" for number in range(5)]
    assert any(line["tags"] for line in found)
    assert [list(photo.tags) for photo in read_photos(options.out)] == [line["tags"] for line in found]


def test_an_interrupted_run_goes_on_and_tags_nothing_twice(
    options: tag.TagCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag.tag(options)
    expected = lines(options.out)
    part = options.out.with_name("t.part-0000.jsonl")
    options.out.unlink()
    kept = part.read_text("utf-8").splitlines()[:3]
    part.write_text("\n".join(kept) + '\n{"file": "photos/4', "utf-8")
    seen: list[str] = []

    def load(photo: Photo) -> Tensor:
        seen.append(photo.path.name)
        return load_photo(photo)

    monkeypatch.setattr("trainer.tag.load_photo", load)
    tag.tag(options)
    assert seen == ["2.png", "3.png", "4.png"]
    assert lines(options.out) == expected


def test_a_line_that_holds_something_else_is_tagged_again(options: tag.TagCommand) -> None:
    tag.tag(options)
    expected, part = lines(options.out), options.out.with_name("t.part-0000.jsonl")
    odd = ['{"file": "photos/0.png", "tags": "a"}', '{"file": "photos/1.png", "tags": [NaN]}', "[1]", "\ud800"]
    part.write_bytes("\n".join(odd).encode("utf-8", "surrogatepass"))
    options.out.unlink()
    tag.tag(options)
    assert lines(options.out) == expected


def test_processes_share_the_photos_and_the_last_one_joins_their_lists(
    options: tag.TagCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lines(tag.tag(options) or options.out)
    for path in options.out.parent.glob("t*.jsonl"):
        path.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, result in (("1", None), ("0", options.out)):
        monkeypatch.setenv("RANK", rank)
        assert tag.tag(options) == result
    assert lines(options.out) == expected


def test_photos_that_cannot_be_read_are_left_out_unless_they_are_many(options: tag.TagCommand) -> None:
    (Path(options.data) / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="Only 4 of 5 photos can be read"):
        tag.tag(options)


def test_pairs_keep_their_lr_so_that_stage_2_trains_on_it(options: tag.TagCommand, tmp_path: Path) -> None:
    for kind, side in (("HR", 64), ("LR", 16)):
        (tmp_path / "pairs" / kind).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (side, side), (90 * number, 80, 20)).save(tmp_path / "pairs" / kind / f"{number}.png")
    tag.tag(replace(options, data=str(tmp_path / "pairs")))
    found = read_photos(options.out)
    assert [photo.lr and photo.lr.resolve() for photo in found] == [
        tmp_path / "pairs" / "LR" / f"{number}.png" for number in range(3)
    ]
    assert Crops(found, size=64).paired
    assert what_lr_is(found) == "LR: given with all 3 photos, and not degraded."
    assert what_lr_is([Photo(photo.path) for photo in found]).startswith("LR: made of 3 photos")


def test_what_else_a_list_says_of_its_photos_stays(options: tag.TagCommand, tmp_path: Path) -> None:
    given = {"file": "photos/1.png", "tags": ["old"], "licence": "CC0", "attribution": "Ä"}
    (tmp_path / "given.jsonl").write_text(json.dumps(given), "utf-8")
    tag.tag(replace(options, data=str(tmp_path / "given.jsonl"), out=tmp_path / "lists" / "t.jsonl"))
    (line,) = lines(tmp_path / "lists" / "t.jsonl")
    assert line == {**given, "file": "../photos/1.png", "tags": line["tags"]}
    assert line["tags"] != ["old"]


def test_photos_in_shards_are_tagged_where_they_lie(options: tag.TagCommand, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        for number in range(3):
            tar.add(Path(options.data) / f"{number}.png", f"{number}.png")
    expected = [line["tags"] for line in lines(tag.tag(options) or options.out)][:3]
    out = tmp_path / "lists" / "shards.jsonl"
    tag.tag(replace(options, data=str(tmp_path / "shards"), out=out))
    found = read_photos(out)
    assert [list(photo.tags) for photo in found] == [line["tags"] for line in lines(out)] == expected
    whole = [load_photo(Photo(Path(options.data) / f"{number}.png")) for number in range(3)]
    assert all(torch.equal(load_photo(photo), image) for photo, image in zip(found, whole, strict=True))


def test_a_mixture_with_weights_is_not_made_a_list_without(options: tag.TagCommand, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text('[[source]]\ndata = "photos"\nweight = 1\n', "utf-8")
    with pytest.raises(DataError, match="tag its sources one by one"):
        tag.tag(replace(options, data=str(tmp_path / "m.toml")))
