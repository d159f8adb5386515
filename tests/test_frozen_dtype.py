"""Frozen weights in fewer bits, the precision of a recipe on a device, and activations that wait elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seesr_core.errors import DataError, SettingsError
from seesr_core.formats.control import RCA
from trainer.capacity.dry_run import cost_of_pass
from trainer.engine.command import get_recipe
from trainer.engine.frozen import FrozenDtype, check_frozen, keep_frozen
from trainer.engine.loop import train
from trainer.stage2.recipes import STAGE2_RECIPES

from .stage2_nets import config, small_networks, small_task, write_photos

WITHOUT_8BIT = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")


def net() -> Any:
    """A convolution, a norm and a linear layer, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Flatten(2), nn.Linear(36, 8))
        return nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.parametrize(
    ("dtype", "bytes_a_weight", "error"),
    [("bf16", 2, 2**-8), ("fp16", 2, 2**-11), pytest.param("8bit", 1, 1 / 100, marks=WITHOUT_8BIT)],
)
def test_kept_weights_are_rounded_and_gradients_pass(dtype: FrozenDtype, bytes_a_weight: int, error: float) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact, kept = net(), net()
    keep_frozen(kept, dtype)
    assert [kept[i].weight.element_size() for i in (0, 1, 4)] == [bytes_a_weight, 4, bytes_a_weight]
    results = [network(x) for network in (exact, kept)]
    gradients = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
    for wanted, found in (results, gradients):
        assert 0 < float((found - wanted).detach().norm() / wanted.detach().norm()) < error
    assert kept[1].weight.dtype == results[1].dtype == torch.float32


def test_under_autocast_in_the_same_precision_nothing_changes() -> None:
    x, kept = torch.rand(1, 3, 8, 8), net()
    keep_frozen(kept, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net()(x), kept(x))


def test_what_learns_and_what_is_exported_stays_as_it_is() -> None:
    nets = small_networks()
    before = {name: p.clone() for name, p in nets.unet.named_parameters() if RCA in f".{name}"}
    keep_frozen(nets.unet.requires_grad_(False), "bf16", but=RCA)
    after = dict(nets.unet.named_parameters())
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert nets.unet.conv_in.weight.dtype == torch.bfloat16


def test_a_run_with_frozen_weights_in_half_learns_nearly_the_same(tmp_path: Path) -> None:
    photos = write_photos(tmp_path)
    losses = []
    for dtype in ("fp32", "bf16"):
        task = small_task(photos, config(steps=1))
        for network in (task.networks.unet, *task.frozen):
            keep_frozen(network, dtype, but=RCA)
        losses.append(float(task.loss(0)[0].detach()))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_what_cannot_be_kept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_frozen("fp32")
    with pytest.raises(SettingsError, match=r"--frozen-dtype bf16 launch with trainer/accelerate/ddp\.yaml"):
        check_frozen("bf16")


def test_eight_bits_without_their_package_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(SettingsError, match=r"8bit\) needs the package bitsandbytes: .* or choose bf16"):
        check_frozen("8bit")


def test_the_paper_s_precision_is_the_device_s_half(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = get_recipe(STAGE2_RECIPES, "paper").loop
    assert replace(loop, device="cpu").resolve_precision() == "bf16"
    assert replace(loop, precision="fp32").resolve_precision() == "fp32"
    for can, name in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda can=can, **_: can)
        assert replace(loop, device="cuda").resolve_precision() == name


def test_a_run_in_mixed_precision_remembers_which_one_it_was(tmp_path: Path) -> None:
    photos = write_photos(tmp_path)
    mixed, full = (config(steps=1, precision=precision) for precision in ("mixed", "fp32"))
    train(small_task(photos, mixed), mixed.loop, tmp_path / "run")
    with pytest.raises(DataError, match="precision: 'bf16' -> 'fp32'"):
        train(small_task(photos, full), full.loop, tmp_path / "run")


def test_activations_that_wait_elsewhere_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, entered = write_photos(tmp_path), []
    save = torch.autograd.graph.save_on_cpu

    def counted(**options: Any) -> Any:
        entered.append(options)
        return save(**options)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", counted)
    here, away = (config(steps=2, offload_activations=offload) for offload in (False, True))
    weights = [train(small_task(photos, c), c.loop, tmp_path / f"{c.loop.offload_activations}") for c in (here, away)]
    assert len(entered) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_plan_knows_what_waits_elsewhere() -> None:
    weight, x = nn.Parameter(torch.ones(100, 100)), torch.ones(1000, 100)

    def loss() -> Tensor:
        y = x
        for _ in range(10):
            y = (y @ weight).tanh()
        return y.mean()

    one = 4 * 1000 * 100
    here, away = (cost_of_pass(loss, [weight], offload=offload)[0] for offload in (False, True))
    assert here > 10 * one
    assert 2 * one <= away < 5 * one
