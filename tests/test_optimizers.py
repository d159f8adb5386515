"""The optimizers' moments: where a checkpoint puts them, and in 8 bits, where bitsandbytes is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.engine.loop import train
from trainer.engine.loop_config import LoopConfig
from trainer.engine.optimizers import build_optimizer
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


@pytest.mark.parametrize(("name", "device"), [("adamw", "cpu"), ("adamw-fused", "meta")])
def test_a_checkpoint_puts_the_fused_step_beside_its_parameter(name: str, device: str) -> None:
    parameter = nn.Parameter(torch.empty(2, device="meta"))  # stands for a GPU
    optimizer = build_optimizer(name, [parameter], learning_rate=1e-3, weight_decay=0.0)
    State({"x": parameter}, {}, optimizer).load([("step.x", torch.tensor(3.0)), ("exp_avg.x", torch.ones(2))])
    assert optimizer.state[parameter]["step"].device.type == device
    assert optimizer.state[parameter]["exp_avg"].device.type == "meta"
