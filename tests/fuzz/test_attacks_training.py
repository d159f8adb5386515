"""Training and evaluation data made to do harm, and checkpoints that are not what was written."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seesr_core.errors import DataError, SeeSRError, SettingsError
from trainer.data.photos import read_photos
from trainer.data.shards import expand
from trainer.engine.checkpoints import NEWEST, OLDER
from trainer.engine.loop import train
from trainer.engine.settings import overridden, read_toml
from trainer.evaluate.semantics.boxes import read_annotations
from trainer.evaluate.semantics.panoptic import read_panoptic
from trainer.stage2.recipes import stage2_debug

from ..ranks import TOY, ToyTask

CONFIG = replace(TOY, steps=9, save_every=3, log_every=1)


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_mixture_that_includes_itself(tmp_path: Path) -> None:
    written(tmp_path / "b.toml", '[[source]]\ndata = "a.toml"\n')
    with pytest.raises(DataError, match=r"a\.toml is a part of itself"):
        read_photos(written(tmp_path / "a.toml", '[[source]]\ndata = "b.toml"\n'))


@pytest.mark.parametrize("entry", ["weight = nan", 'weight = "much"', "weight = -1", "weight = inf", "first = -1"])
def test_weights_of_a_mixture(tmp_path: Path, entry: str) -> None:
    with pytest.raises(DataError, match=r"should have a table \[\[source\]\]"):
        read_photos(written(tmp_path / "a.toml", f'[[source]]\ndata = "x"\n{entry}\n'))


@pytest.mark.parametrize("name", ["x-{0..9999999999}.tar", "x-{0..999999}.tar", "x-{0..999}-{0..999}-{0..9}.tar"])
def test_a_range_of_shards_beyond_any_set(name: str) -> None:
    with pytest.raises(DataError, match="stands for more than 100,000 shards"):
        expand(name)


@pytest.mark.parametrize("name", ["n" * 5000, "n" * 5000 + ".toml", "n" * 5000 + ".tar", "a\0b"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(SeeSRError):
        read_photos(tmp_path / name)


def shard(path: Path, **files: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "tags",
    [
        b"[" * 100_000,
        b'{"tags": [1]}',
        b'{"tags": "a"}',
        b"\xff",
        b'{"tags": [NaN]}',
        b'{"tags":["' + b"a" * (1 << 21) + b'"]}',
    ],
)
def test_tags_in_a_shard_that_are_none(tmp_path: Path, tags: bytes) -> None:
    with pytest.raises(DataError, match="should hold the tags of a photo"):
        read_photos(str(shard(tmp_path / "x.tar", a_json=tags)))


def test_a_member_of_absurd_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 50
    path = written(tmp_path / "x.tar", info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="No photos in"):
        read_photos(str(path))
    assert "is damaged" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"file": 3}',
        '{"file": "a", "tags": [1]}',
        '{"file": "a\\u0000b"}',
        "9" * 5000,
        '{"file": "a", "shard": "x.tar", "offset": -1, "size": 3}',
        '{"file": "a", "shard": "x.tar", "offset": 0, "size": 99999999999999}',
    ],
)
def test_lines_of_a_list(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"photos\.jsonl:1"):
        read_photos(written(tmp_path / "photos.jsonl", line + "\n"))


@pytest.mark.parametrize(
    "text",
    [
        "crop = [[[1]]]",
        "crop = 99999999999999999999999999",
        "milestones = [1]",
        "[loop]\nmilestones = [[1], [2]]",
        "[loop]\nmilestones = [[[1]], 2]",
        "[loop]\nlearning_rate = nan",
        '[degradation]\nresize_modes = ["evil"]',
        "[degradation.first]\nresize_weights = [1.0]",
        "[degradation.first.blur]\nsizes = [[7], [9]]",
        "a = " + "[" * 5000,
    ],
)
def test_recipes_with_other_shapes(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "mine.toml", text)
    with pytest.raises(SettingsError, match=r"mine\.toml"):
        overridden(stage2_debug(), read_toml(path), path)


COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4}],
    "categories": [{"id": 1, "name": "cat"}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"images": [{"id": 1, "file_name": 5, "width": 8, "height": 8}]},
        {"images": [{"id": [], "file_name": "a", "width": 8, "height": 8}]},
        {"images": [{"id": 1, "file_name": "a", "width": 1 << 40, "height": 8}]},
        {"categories": [{"id": 1, "name": {"a": 1}}]},
        {"annotations": [{"image_id": 2, "category_id": 1, "bbox": [0, 0, 2, 2]}]},
        {"annotations": [{"image_id": 1, "category_id": 1, "bbox": ["nan", 0, 2, 2]}]},
        {"annotations": {"a": 1}},
    ],
)
def test_annotations_of_other_types(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"x\.json"):
        read_annotations(written(tmp_path / "x.json", json.dumps({**COCO, **change})))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"images": Infinity}', "\0", "9" * 5000, "\ud800".encode("utf-8", "surrogatepass")]
)
def test_annotations_that_are_no_json(tmp_path: Path, text: str | bytes) -> None:
    for reader in (read_annotations, read_panoptic):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=r"x\.json should be COCO"):
            reader(written(tmp_path / "x.json", text))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a\0b.png", "", "..\\secret.png"])
def test_panoptic_masks_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "x").mkdir()
    data = {"annotations": [{"file_name": name, "segments_info": []}], "categories": []}
    with pytest.raises(DataError, match=r"x\.json"):
        read_panoptic(written(tmp_path / "x.json", json.dumps(data)))


def final(out: Path) -> dict[str, torch.Tensor]:
    return dict(train(ToyTask(CONFIG), CONFIG, out))


def test_flipped_bytes_cost_the_steps_since_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = final(tmp_path)
    content = bytearray((tmp_path / NEWEST).read_bytes())
    for place in range(len(content) - 200, len(content) - 100):
        content[place] ^= 255
    (tmp_path / NEWEST).write_bytes(content)
    with caplog.at_level(logging.INFO):
        result = final(tmp_path)
    assert re.search(r"skipped the damaged checkpoint .*some of its bytes have changed", caplog.text)
    assert "at step 6" in caplog.text
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def rewritten(path: Path, rename: bool = False, **metadata: str) -> None:
    """As an older release wrote it: without hash."""
    with safe_open(path, "pt") as handle:
        fields = {name: value for name, value in handle.metadata().items() if name != "sha256"}
    tensors = {(f"{name}x" if rename else name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {**fields, **metadata})


def test_renamed_tensors_and_metadata_that_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    final(tmp_path)
    rewritten(tmp_path / NEWEST, rename=True)
    with pytest.raises(DataError, match=r"does not belong to this run: \d+ of its tensors are missing"):
        final(tmp_path)
    for text in ("many", "[" * 100_000, "-1", "9" * 5000):
        rewritten(tmp_path / NEWEST, step=text)
        caplog.clear()
        final(tmp_path)
        assert "skipped the damaged checkpoint" in caplog.text


def test_a_checkpoint_of_an_unknown_type_of_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Found by `python -m tools.fuzz --seed 20261129 --kind checkpoint --number 113`."""
    final(tmp_path)
    rewritten(tmp_path / NEWEST)
    content = (tmp_path / NEWEST).read_bytes()
    (tmp_path / NEWEST).write_bytes(content.replace(b'"F32"', b'"F99"', 1))
    final(tmp_path)
    assert "unknown type 'F99'" in caplog.text


def test_checkpoints_of_older_releases_are_taken(tmp_path: Path) -> None:
    expected = final(tmp_path)
    (tmp_path / NEWEST).unlink()
    rewritten(tmp_path / OLDER / "00000006.safetensors")
    result = final(tmp_path)
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[1]", b'{"step": "x"}', b'{"step": null}', b"[" * 100_000, b"9" * 5000]
)
def test_logs_that_are_damaged(tmp_path: Path, line: bytes) -> None:
    short = replace(CONFIG, steps=3)
    train(ToyTask(short), short, tmp_path)
    with (tmp_path / "log.jsonl").open("ab") as handle:
        handle.write(line + b"\n")
    (tmp_path / "run.json").write_bytes(line)
    final(tmp_path)
    steps = [json.loads(text)["step"] for text in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert steps == list(range(1, 10))
