"""Damaged checkpoints, a full disk, folders in use: what is kept, and what is said."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seesr_core.errors import DataError, ResourceError
from trainer.engine.checkpoints import BEST, NEWEST, OLDER, Checkpoints
from trainer.engine.lock import Watch, held
from trainer.engine.loop import train
from trainer.engine.loop_config import LoopConfig

from .full_disk import files_of_at_most
from .ranks import TOY, ToyTask

CONFIG = replace(TOY, steps=9, save_every=3, log_every=1)


def final(out: Path, config: LoopConfig = CONFIG) -> Mapping[str, Tensor]:
    return train(ToyTask(config), config, out)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_a_truncated_newest_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = final(tmp_path / "whole")
    final(tmp_path / "cut")
    truncate(tmp_path / "cut" / NEWEST)
    with caplog.at_level(logging.INFO):
        result = final(tmp_path / "cut")
    assert "skipped the damaged checkpoint" in caplog.text
    assert "at step 6" in caplog.text
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())
    truncate(tmp_path / "cut" / NEWEST)
    (tmp_path / "cut" / OLDER / "00000006.safetensors").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"No checkpoint in .* is whole \(checkpoint.safetensors, 00000006.safetensors\)"
    ):
        final(tmp_path / "cut")


def test_a_run_that_ended_between_two_renames_goes_on_from_the_older_checkpoint(tmp_path: Path) -> None:
    expected = final(tmp_path)
    (tmp_path / NEWEST).unlink()
    result = final(tmp_path)
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("keep_last", "older"), [(1, []), (2, [6]), (3, [3, 6]), (9, [3, 6])])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep_last: int, older: list[int]) -> None:
    final(tmp_path, replace(CONFIG, keep_last=keep_last))
    assert sorted(int(path.stem) for path in (tmp_path / OLDER).glob("*.safetensors")) == older
    saved = Checkpoints(tmp_path).newest_whole()
    assert saved is not None
    assert (saved.step, saved.notes["images"]) == (9, 36)


class JudgedTask(ToyTask):
    """A toy whose validation is best at step 4."""

    def sample(self, folder: Path, step: int) -> Mapping[str, float]:  # type: ignore[override]
        return {"val_loss": abs(step - 4.0)}


def test_the_best_checkpoint_is_kept_with_its_figures(tmp_path: Path) -> None:
    config = replace(CONFIG, sample_every=2)
    train(JudgedTask(config), config, tmp_path)
    best = Checkpoints(tmp_path / OLDER)
    assert json.loads((tmp_path / OLDER / BEST).with_suffix(".json").read_text("utf-8")) == {"step": 4, "val_loss": 0.0}
    (best.folder / BEST).rename(best.folder / NEWEST)
    saved = best.newest_whole()
    assert saved is not None
    assert saved.step == 4
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9]


def test_a_full_disk_leaves_the_last_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    expected = final(tmp_path / "whole")
    short = replace(CONFIG, steps=3)
    final(tmp_path / "full", short)
    before = (tmp_path / "full" / NEWEST).read_bytes()
    with files_of_at_most(len(before) - 500), pytest.raises(ResourceError, match=r"Could not write .*checkpoint"):
        final(tmp_path / "full")
    assert (tmp_path / "full" / NEWEST).read_bytes() == before
    assert [path.name for path in (tmp_path / "full").glob(".checkpoint*")] == []
    result = final(tmp_path / "full")
    assert all(torch.equal(result[name], tensor) for name, tensor in expected.items())


def test_a_folder_in_use_by_a_living_run_is_refused_and_its_owner_named(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(DataError, match=r"is in use by process \d+ on .*, since \d{4}-"):
        final(tmp_path)
    assert final(tmp_path)


def test_a_process_is_lost_when_its_lock_is_free_and_it_has_not_finished(tmp_path: Path) -> None:
    told: list[str] = []
    first = Watch(tmp_path, 0, 3, told.append, interval=0.01)
    second, third = (Watch(tmp_path, rank, 3, told.append) for rank in (1, 2))
    assert first.lost() == ""
    second.finish()
    assert first.lost() == ""
    third.lock.release()
    first.start()
    first.thread.join(timeout=30)
    assert len(told) == 1
    assert told[0].startswith("rank 2 (process ")
    first.finish()
