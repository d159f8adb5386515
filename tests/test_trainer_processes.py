"""Several processes, and runs that are cut short: the losses are those of one undisturbed process."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer.engine.checkpoints import NEWEST

from . import ranks
from .stage2_nets import write_photos

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")


def losses(out: Path) -> list[tuple[float, float]]:
    """Loss and norm of the gradients at every step."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def assert_same_losses(name: str, folder: Path, *, steps: int, rtol: float) -> None:
    """Two and four processes against one."""
    ranks.run(name, folder)
    alone = losses(folder / "1")
    assert len(alone) == steps
    for count in ("2", "4"):
        torch.testing.assert_close(torch.tensor(losses(folder / count)), torch.tensor(alone), rtol=rtol, atol=1e-6)


@pytest.mark.slow
def test_stage_2_has_the_same_losses_in_1_2_and_4_processes(tmp_path: Path) -> None:
    write_photos(tmp_path)
    assert_same_losses("equal", tmp_path, steps=2, rtol=2e-5)


@pytest.mark.slow
def test_dropout_and_averages_are_the_same_in_1_2_and_4_processes(tmp_path: Path) -> None:
    assert_same_losses("toy", tmp_path, steps=6, rtol=1e-5)


@pytest.mark.slow
def test_when_a_process_dies_the_others_stop_and_name_it(tmp_path: Path) -> None:
    ranks.run("lost", tmp_path, timeout=900)
    told = (tmp_path / "told.txt").read_text("utf-8")
    assert told.startswith("rank 1 (process ")
    assert "has ended, so this run stops" in told


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_like_one_left_alone(tmp_path: Path) -> None:
    ranks.run("killed", tmp_path)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == ranks.TOY.steps


@pytest.mark.slow
def test_a_sharded_state_is_saved_whole_and_read_back_into_its_shards(tmp_path: Path) -> None:
    ranks.run("sharded", tmp_path)


@pytest.mark.slow
def test_sharded_by_fsdp2_the_losses_are_the_same_and_a_run_goes_on(tmp_path: Path) -> None:
    ranks.run("fsdp2", tmp_path)
    alone = losses(tmp_path / "whole")
    assert len(alone) == 6
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "sharded")), torch.tensor(alone), rtol=1e-5, atol=1e-6)


def same_losses_pictures_and_export(alone: Path, sharded: Path) -> None:
    torch.testing.assert_close(torch.tensor(losses(sharded)), torch.tensor(losses(alone)), rtol=2e-5, atol=1e-6)
    pictures = [np.asarray(Image.open(run / "samples" / "000002.png")).astype(int) for run in (alone, sharded)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    exports = [load_file(run / "seesr-control.safetensors") for run in (alone, sharded)]
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[0].items():
        torch.testing.assert_close(exports[1][name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_stage_2_sharded_by_fsdp2_has_the_same_losses_pictures_and_export(tmp_path: Path) -> None:
    write_photos(tmp_path)
    ranks.run("fsdp2_stage2", tmp_path)
    same_losses_pictures_and_export(tmp_path / "whole", tmp_path / "sharded")


def lines(out: Path) -> list[dict[str, float]]:
    """The log without its clock."""
    found = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return [{name: figure for name, figure in line.items() if name != "seconds"} for line in found]


@needs_deepspeed
def test_by_zero_steps_are_skipped_and_runs_go_on_as_in_one_process(tmp_path: Path) -> None:
    ranks.run("zero", tmp_path)
    for runs in (tmp_path / "1", tmp_path / "2"):
        alone, parts = lines(runs / "alone"), lines(runs / "parts")
        assert [line.get("skipped", 0) for line in alone] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
        assert lines(runs / "whole") == parts[:8]
        for expected, found in zip(alone, parts, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        kept = Path("checkpoints") / "00000008.safetensors"  # put aside when one process went on
        states = [load_file(runs / path) for path in (Path("whole", NEWEST), Path("parts", kept), Path("alone", kept))]
        assert states[0].keys() == states[1].keys() == states[2].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        for name, tensor in states[0].items():
            torch.testing.assert_close(tensor, states[2][name], rtol=1e-5, atol=1e-6)


@needs_deepspeed
@pytest.mark.slow
def test_stage_2_by_zero_has_the_same_losses_pictures_and_export(tmp_path: Path) -> None:
    write_photos(tmp_path)
    ranks.run("zero_stage2", tmp_path)
    same_losses_pictures_and_export(tmp_path / "whole", tmp_path / "sharded")
