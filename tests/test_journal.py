"""What a run tells: figures averaged over processes, the log after an interruption, and packages that are missing."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from seesr_core.errors import SettingsError
from trainer.engine.journal import Journal, Progress, RunningMeans, Total
from trainer.engine.loop_config import LoopConfig
from trainer.engine.needs import check_needs


def test_figures_are_averaged_over_the_times_that_they_were_given() -> None:
    one, other = RunningMeans(), RunningMeans()
    one.add({"loss": 1.0, "rare": 5.0})
    one.add({"loss": 2.0})
    other.add({"loss": 6.0})
    assert RunningMeans.merged([one.state(), other.state()]).means() == {"loss": 3.0, "rare": 5.0}
    assert RunningMeans(**one.state()).means() == {"loss": 1.5, "rare": 5.0}
    one.clear()
    assert one.means() == {}


def test_a_figure_of_some_images_is_the_same_however_they_are_divided() -> None:
    values, low = [4.0, 1.0, 3.0, 9.0, 5.0, 2.0, 7.0, 8.0], [0, 1, 2, 5]
    for parts in (1, 2, 4):
        size = len(values) // parts
        processes = [RunningMeans() for _ in range(parts)]
        for number, process in enumerate(processes):
            within = [values[i] for i in low if i // size == number]
            process.add({"loss_low_t": Total(sum(within), len(within))} if within else {})
        merged = RunningMeans.merged(process.state() for process in processes)
        assert merged.means() == {"loss_low_t": 2.5}


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writes=True)
    for step in (1, 2, 3):
        journal.write({"step": step, "loss": 0.5})
    journal.write({"step": 3, "val_loss": 0.5}, kind="validation")
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 1, "lo')
    Journal(tmp_path, writes=True).begin(2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (tmp_path / "validation.jsonl").read_text("utf-8") == ""


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, writes=False, wandb="project")
    journal.begin(0)
    journal.write({"step": 1})
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_figures_go_to_tensorboard_and_its_absence_is_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    board = Recorder()
    fake: Any = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = lambda folder, purge_step: board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    journal = Journal(tmp_path, writes=True)
    journal.begin(3)
    journal.write({"step": 4, "loss": 0.5, "lr": 0.1})
    journal.close()
    assert board.seen == [("loss", 0.5, 4), ("lr", 0.1, 4), "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO):
        Journal(tmp_path, writes=True).begin(4)
    assert "pip install tensorboard" in caplog.text


class Recorder:
    """Stands for a writer of TensorBoard files."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def add_scalar(self, *scalar: Any) -> None:
        self.seen.append(scalar)

    def close(self) -> None:
        self.seen.append("closed")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begun, losses in ((3, {4: 0.5, 5: 0.25}), (4, {5: 0.125, 6: 1.0})):
        journal = Journal(tmp_path, writes=True)
        journal.begin(begun)
        for step, loss in losses.items():
            journal.write({"step": step, "loss": loss})
        journal.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 0.5), (5, 0.125), (6, 1.0)]


def test_weights_and_biases_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SettingsError, match="pip install wandb"):
        check_needs(LoopConfig(steps=1, batch_size=1, learning_rate=1.0, wandb="faces"))
    seen: list[Any] = []
    fake: Any = types.ModuleType("wandb")

    def init(**options: Any) -> Any:
        seen.append(options["project"])
        return fake

    fake.init = init
    fake.log = lambda figures, step: seen.append((figures, step))
    fake.finish = lambda: seen.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    journal = Journal(tmp_path, writes=True, wandb="faces")
    journal.write({"step": 2, "loss": 1.0})
    journal.close()
    assert seen == ["faces", ({"loss": 1.0}, 2), "finished"]


def test_without_a_terminal_a_line_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "tqdm.tqdm",
        lambda **options: types.SimpleNamespace(
            disable=True, set_postfix_str=lambda *_, **__: None, update=lambda images: None, close=lambda: None
        ),
    )
    clock = iter([0.0, 30.0, 60.0, 60.0])
    monkeypatch.setattr("trainer.engine.journal.time.monotonic", lambda: next(clock))
    progress = Progress(8, 80, shown=True)
    with caplog.at_level(logging.INFO):
        progress.add(8, 1.0)
        assert caplog.text == ""
        progress.add(4, 1.0)
    assert caplog.messages == ["20 of 80 images, 0.20 images/s, loss 1.0000, 0:05:00 left"]


def test_the_bar_averages_the_loss_and_counts_images() -> None:
    progress = Progress(8, 32, shown=False)
    for loss in (1.0, float("nan"), 0.0):
        progress.add(8, loss)
    assert progress.loss == pytest.approx(0.98)
    progress.close()
