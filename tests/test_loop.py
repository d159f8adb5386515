"""The training loop: schedule, resume after an interruption at any step, log, and refusals."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seesr_core.errors import DataError, SettingsError
from trainer.data.order import seeded
from trainer.engine.identity import flat
from trainer.engine.loop import train
from trainer.engine.loop_config import LoopConfig
from trainer.engine.optimizers import build_optimizer

from . import ranks


class InterruptedRunError(Exception):
    """Stands for the end of the process."""


class ToyTask:
    """Regression with dropout, beside a frozen layer."""

    def __init__(self, *, stop_at: int | None = None, explode_at: Container[int] = ()) -> None:
        self.first, self.dropout, self.frozen = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1).requires_grad_(False)
        self.trained = nn.Sequential(self.first, self.dropout, self.frozen)
        generator = seeded(1)
        for parameter in self.trained.parameters():
            parameter.data.normal_(generator=generator)
        self.stop_at, self.explode_at = stop_at, explode_at
        self.samples: list[tuple[int, Tensor]] = []

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        if step == self.stop_at:
            raise InterruptedRunError
        x = torch.randn(6, 4, generator=seeded(2, step))
        loss = (self.trained(x) - x.sum(1, keepdim=True)).square().mean()
        return loss * (float("nan") if step in self.explode_at else 1.0), {"number": float(step)}

    def sample(self, folder: Path, step: int) -> None:
        self.samples.append((step, self.first.weight.detach().clone()))


CONFIG = LoopConfig(
    steps=12,
    batch_size=6,
    learning_rate=0.05,
    warmup=3,
    decay="cosine",
    ema=0.9,
    device="cpu",
    log_every=2,
    save_every=5,
    sample_every=4,
)


def log_lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_the_rate_rises_halves_and_falls() -> None:
    steady = replace(CONFIG, learning_rate=1.0, warmup=4, decay="constant", milestones=(6, 9))
    assert [steady.lr_at(step) for step in (0, 1, 3, 5, 6, 8, 9)] == [0.25, 0.5, 1.0, 1.0, 0.5, 0.5, 0.25]
    falling = replace(CONFIG, learning_rate=1.0, warmup=0, steps=100)
    assert falling.lr_at(0) == 1.0
    assert falling.lr_at(50) == pytest.approx(0.55)
    assert falling.lr_at(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"save_every": 0},
        {"decay": "linear"},
        {"precision": "fp8"},
        {"accumulation": 0},
        {"keep_last": 0},
        {"compile": "everything"},
        {"ema": 1.0},
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        replace(CONFIG, **change)


@pytest.mark.parametrize("stop_at", [1, 5, 6, 9, 11])
def test_after_an_interruption_at_any_step_the_run_ends_as_if_there_had_been_none(tmp_path: Path, stop_at: int) -> None:
    expected = train(ToyTask(), CONFIG, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        train(ToyTask(stop_at=stop_at), CONFIG, tmp_path / "cut")
    with (tmp_path / "cut" / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 1')  # the process ended while it wrote a line
    resumed = train(ToyTask(), CONFIG, tmp_path / "cut")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert [line["step"] for line in log_lines(tmp_path / "cut")] == [2, 4, 6, 8, 10, 12]
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")


def test_a_finished_run_is_not_trained_further_but_may_be_prolonged(tmp_path: Path) -> None:
    constant = replace(CONFIG, decay="constant")
    first = train(ToyTask(), constant, tmp_path / "run")
    again = train(ToyTask(stop_at=0), constant, tmp_path / "run")
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    longer = replace(constant, steps=15)
    prolonged = train(ToyTask(), longer, tmp_path / "run")
    expected = train(ToyTask(), longer, tmp_path / "other")
    assert all(torch.equal(prolonged[name], tensor) for name, tensor in expected.items())


def test_only_what_requires_a_gradient_is_trained_saved_and_returned(tmp_path: Path) -> None:
    task = ToyTask()
    frozen = task.frozen.weight.detach().clone()
    assert set(train(task, CONFIG, tmp_path)) == {"0.weight", "0.bias"}
    assert torch.equal(task.frozen.weight, frozen)


def test_dropout_is_drawn_anew_at_every_step_and_the_callers_random_state_is_untouched(tmp_path: Path) -> None:
    task = ToyTask()
    masks: list[Tensor] = []
    task.dropout.register_forward_hook(lambda _m, _i, output: masks.append(output.detach() == 0))
    before = torch.get_rng_state()
    train(task, CONFIG, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == CONFIG.steps


def test_samples_show_the_averaged_weights_which_are_what_is_returned(tmp_path: Path) -> None:
    task = ToyTask()
    result = train(task, CONFIG, tmp_path)
    assert [step for step, _ in task.samples] == [4, 8, 12]
    assert torch.equal(task.samples[-1][1], result["0.weight"])
    assert not torch.equal(task.first.weight, result["0.weight"])


def test_a_run_with_other_settings_is_refused_and_the_setting_named(tmp_path: Path) -> None:
    train(ToyTask(), CONFIG, tmp_path, identity={"photos": "5"})
    with pytest.raises(DataError, match=r"other settings \(learning_rate: 0\.05 -> 0\.1\); use another folder"):
        train(ToyTask(), replace(CONFIG, learning_rate=0.1), tmp_path, identity={"photos": "5"})
    with pytest.raises(DataError, match="photos: '5' -> '6'"):
        train(ToyTask(), CONFIG, tmp_path, identity={"photos": "6"})


def test_a_step_whose_loss_is_no_number_is_skipped_and_counted(tmp_path: Path) -> None:
    result = train(ToyTask(explode_at={7, 9}), CONFIG, tmp_path)
    assert all(bool(tensor.isfinite().all()) for tensor in result.values())
    assert [line.get("skipped") for line in log_lines(tmp_path)] == [None, None, None, 1, 2, 2]
    assert all(math.isfinite(line["loss"]) for line in log_lines(tmp_path))


def test_too_many_unsound_steps_in_a_row_end_the_run_and_keep_the_last_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, max_skipped=1)
    with pytest.raises(DataError, match=r"2 steps in a row had gradients that are not finite, the last one step 8"):
        train(ToyTask(explode_at={7, 8}), config, tmp_path)
    resumed = train(ToyTask(), config, tmp_path)
    assert all(bool(tensor.isfinite().all()) for tensor in resumed.values())
    assert log_lines(tmp_path)[-1]["step"] == CONFIG.steps


def test_lines_of_a_former_run_without_checkpoint_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 99}\n', "utf-8")
    train(ToyTask(), CONFIG, tmp_path)
    assert log_lines(tmp_path)[0]["step"] == 2


def test_nested_settings_get_dotted_names() -> None:
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": [3]}}}) == {"a": 1, "b.c": 2, "b.d.e": [3]}


def test_parts_of_a_batch_give_the_losses_of_the_whole(tmp_path: Path) -> None:
    lines = {}
    for accumulation in (1, 4):
        config = replace(ranks.TOY, steps=4, accumulation=accumulation)
        train(ranks.ToyTask(config), config, tmp_path / str(accumulation))
        lines[accumulation] = [(line["loss"], line["grad_norm"]) for line in log_lines(tmp_path / str(accumulation))]
    torch.testing.assert_close(torch.tensor(lines[4]), torch.tensor(lines[1]), rtol=1e-5, atol=1e-6)
    with pytest.raises(SettingsError, match="A batch of 4 images cannot be divided among 1 processes × accumulation 3"):
        train(ranks.ToyTask(ranks.TOY), replace(ranks.TOY, accumulation=3), tmp_path / "3")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_precision_and_optimizer_learns(tmp_path: Path, precision: str) -> None:
    config = replace(ranks.TOY, steps=40, precision=precision, optimizer="adamw-fused", save_every=40)
    train(ranks.ToyTask(config), config, tmp_path)
    losses = [line["loss"] for line in log_lines(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_half_precision_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="fp16 needs a GPU; choose bf16"):
        train(ranks.ToyTask(ranks.TOY), replace(ranks.TOY, precision="fp16"), tmp_path)


def test_an_optimizer_that_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"optimizer must be 'adamw', 'adamw-fused', .*Lion', got 'sgd'"):
        build_optimizer("sgd", [nn.Parameter(torch.zeros(1))], learning_rate=0.1, weight_decay=0.0)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(SettingsError, match="pip install bitsandbytes"):
            train(ranks.ToyTask(ranks.TOY), replace(ranks.TOY, optimizer="adamw-8bit"), tmp_path)


def test_compiled_parts_have_the_same_losses_and_names(tmp_path: Path) -> None:
    compiled = replace(ranks.TOY, steps=2, compile="all", compile_backend="eager")
    tasks = [ranks.ToyTask(ranks.TOY) for _ in range(2)]
    for task in tasks:
        task.trained.eval()
    plain = train(tasks[0], replace(ranks.TOY, steps=2), tmp_path / "plain")
    result = train(tasks[1], compiled, tmp_path / "compiled")
    assert all(torch.equal(result[name], tensor) for name, tensor in plain.items())
    assert set(result) == set(plain)


def test_a_run_folder_tells_recipe_code_and_environment(tmp_path: Path) -> None:
    for steps in (1, 2):
        train(ToyTask(), replace(CONFIG, steps=steps, decay="constant"), tmp_path, identity={"photos": "5"})
    run = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert run["recipe"]["photos"] == "5"
    assert run["recipe"]["learning_rate"] == CONFIG.learning_rate
    assert len(run["starts"]) == 2
    assert run["starts"][0]["packages"]["torch"].startswith(torch.__version__.split("+")[0])
