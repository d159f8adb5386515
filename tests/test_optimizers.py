"""The optimizers' moments: where a checkpoint puts them, and in 8 bits, where bitsandbytes is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seesr_core.errors import SettingsError
from trainer.engine.loop import train
from trainer.engine.loop_config import LoopConfig
from trainer.engine.needs import check_packages
from trainer.engine.optimizers import build_optimizer, moment_bytes
from trainer.engine.state import State

from .ranks import TOY, ToyTask


class WideToy(ToyTask):
    """Enough weights for 8-bit moments, which small tensors do not get."""

    def __init__(self, config: LoopConfig) -> None:
        super().__init__(config)
        self.trained = nn.Sequential(nn.Linear(4, 2048), nn.Linear(2048, 1))
        for number, parameter in enumerate(self.trained.parameters()):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))


def test_moments_in_8_bits_are_a_quarter_and_a_run_goes_on_exactly(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = replace(TOY, steps=6, optimizer="adamw-8bit", learning_rate=1e-3, save_every=3, ema=0.0)
    whole = train(WideToy(config), config, tmp_path / "whole")
    train(WideToy(config), replace(config, steps=3), tmp_path / "resumed")
    resumed = train(WideToy(config), config, tmp_path / "resumed")
    logs = [(tmp_path / name / "log.jsonl").read_text("utf-8").splitlines() for name in ("whole", "resumed")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    optimizer = build_optimizer("adamw-8bit", [nn.Parameter(torch.ones(64, 64))], learning_rate=1e-3, weight_decay=0.0)
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.sum().backward()
    optimizer.step()
    assert optimizer.state[parameter]["state1"].dtype is torch.uint8


class Averaged(torch.optim.SGD):
    """Keeps the mean of its iterates for use, as optimizers without a schedule do; at first it is in use."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr)
        self.param_groups[0] |= {"k": 0, "in_use": True}

    def step(self, closure: Any = None) -> Any:
        """A step of SGD, and the mean."""
        (group,) = self.param_groups
        assert not group["in_use"], "a step with the weights that are meant for use"
        super().step(closure)
        group["k"] += 1
        for p in group["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.detach(), 1 / group["k"])

    def eval(self) -> None:
        """Put the means into use."""
        self._swap(True)

    def train(self) -> None:
        """Put the iterates back."""
        self._swap(False)

    @torch.no_grad()
    def _swap(self, in_use: bool) -> None:
        (group,) = self.param_groups
        for p in group["params"] if in_use != group["in_use"] else ():
            if "mean" in self.state[p]:
                self.state[p]["mean"], kept = p.detach().clone(), self.state[p]["mean"]
                p.copy_(kept)
        group["in_use"] = in_use


IMPORTED = ("torch.optim.NAdam", f"{__name__}.Averaged", "lion_pytorch.Lion", "prodigyopt.Prodigy")


@pytest.mark.parametrize("name", [*IMPORTED, "schedulefree.AdamWScheduleFree"])
def test_an_optimizer_by_its_import_path_learns_and_goes_on_exactly(name: str, tmp_path: Path) -> None:
    module = name.partition(".")[0]
    if module != "tests":
        pytest.importorskip(module)
    rate = 1.0 if "Prodigy" in name else 1e-3
    config = replace(TOY, steps=6, optimizer=name, learning_rate=rate, save_every=3, sample_every=2, ema=0.0)
    whole = train(WideToy(config), config, tmp_path / "whole")
    train(WideToy(config), replace(config, steps=3), tmp_path / "resumed")
    resumed = train(WideToy(config), config, tmp_path / "resumed")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] or name.endswith("Averaged")  # whose steps are small


def test_what_is_exported_is_what_an_optimizer_means_for_use(tmp_path: Path) -> None:
    config = replace(TOY, steps=4, optimizer=f"{__name__}.Averaged", learning_rate=1e-3, sample_every=0, ema=0.0)
    steps = [train(WideToy(config), replace(config, steps=n), tmp_path / str(n)) for n in (1, 2)]
    plain = replace(config, optimizer="torch.optim.SGD", weight_decay=0.0)
    iterates = [train(WideToy(config), replace(plain, steps=n), tmp_path / f"sgd{n}") for n in (1, 2)]
    for key, mean in steps[1].items():
        assert torch.allclose(mean, (iterates[0][key] + iterates[1][key]) / 2, atol=1e-7)
        assert torch.equal(steps[0][key], iterates[0][key])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.Lion", "cannot be imported .*install its package"),
        ("torch.optim.NoSuch", "cannot be imported"),
        ("torch.nn.Linear", r"is no torch\.optim\.Optimizer"),
    ],
)
def test_a_path_that_leads_to_no_optimizer_is_refused_before_anything_is_read(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_packages(replace(TOY, optimizer=name))


def test_the_plan_knows_what_an_optimizer_keeps() -> None:
    assert [moment_bytes(name) for name in ("adamw", "adamw-8bit", "torch.optim.SGD")] == [8, 2, 0]
    assert moment_bytes("torch.optim.AdamW") == moment_bytes("adamw")


@pytest.mark.parametrize(("name", "device"), [("adamw", "cpu"), ("adamw-fused", "meta")])
def test_a_checkpoint_puts_the_fused_step_beside_its_parameter(name: str, device: str) -> None:
    parameter = nn.Parameter(torch.empty(2, device="meta"))  # stands for a GPU
    optimizer = build_optimizer(name, [parameter], learning_rate=1e-3, weight_decay=0.0)
    State({"x": parameter}, {}, optimizer).load([("step.x", torch.tensor(3.0)), ("exp_avg.x", torch.ones(2))])
    assert optimizer.state[parameter]["step"].device.type == device
    assert optimizer.state[parameter]["exp_avg"].device.type == "meta"
