"""Outputs of frozen networks are made once, and never served for another network."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.data.cache import FrozenCache

from .stage2_nets import config, small_task, write_photos


class Counted:
    """A stand-in network that counts its inputs."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, texts: list[str]) -> Tensor:
        self.seen += texts
        return torch.tensor([[float(len(text)), float(ord(text[0]))] for text in texts])


def test_every_input_is_computed_once_and_rows_come_in_order() -> None:
    network, cache = Counted(), FrozenCache("a")
    assert cache.get(["bb", "a", "bb"], network).tolist() == [[2, 98], [1, 97], [2, 98]]
    assert cache.get(["a", "ccc"], network).tolist() == [[1, 97], [3, 99]]
    assert network.seen == ["bb", "a", "ccc"]


def test_rows_on_disk_outlive_the_process_but_not_the_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = FrozenCache("a", tmp_path, shard_bytes=16)
    first.get(["x", "yy", "zzz"], Counted())
    network = Counted()
    again = FrozenCache("a", tmp_path)
    assert again.get(["yy", "x", "zzz"], network).tolist() == [[2, 121], [1, 120], [3, 122]]
    assert network.seen == ["zzz"]
    other = Counted()
    with caplog.at_level(logging.INFO):
        FrozenCache("b", tmp_path).get(["x"], other)
    assert other.seen == ["x"]
    assert "made by another network" in caplog.text


def test_a_damaged_shard_is_left_out(tmp_path: Path) -> None:
    FrozenCache("a", tmp_path, shard_bytes=1).get(["x"], Counted())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    network = Counted()
    FrozenCache("a", tmp_path).get(["x"], network)
    assert network.seen == ["x"]


def test_memory_is_limited_and_what_is_on_disk_is_read_again(tmp_path: Path) -> None:
    network = Counted()
    cache = FrozenCache("a", tmp_path, room=16, shard_bytes=1)
    for text in ("x", "yy", "zzz", "x"):
        cache.get([text], network)
    assert len(cache.rows) == 2
    assert network.seen == ["x", "yy", "zzz"]
    forgetful = FrozenCache("a", room=8)
    for text in ("x", "yy", "x"):
        forgetful.get([text], network)
    assert network.seen == ["x", "yy", "zzz", "x", "yy", "x"]


def test_stage_2_has_the_losses_that_it_has_without_the_cache(tmp_path: Path) -> None:
    task = small_task(write_photos(tmp_path), config(), text_folder=tmp_path / "texts")
    batch = task.batch(0)
    plain = task.predict(batch, task.networks.encode_text(batch.prompts))
    for _ in range(2):
        cached = task.predict(batch, task.text_states(batch.prompts))
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
    assert task._texts is not None
    assert task._texts.computed == len(set(batch.prompts))
