"""A step of the trainers on a device that is not there: degradation, loss, backward pass, clipping and optimizer.

The task's own loss and optimizer are driven as the loop does (`Pass`, the recipe's autocast); accelerate is left out,
since it asks for the device's library. What the loop reads of a step it reads after the backward pass.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from trainer.data.crops import Crops
from trainer.data.photos import read_photos
from trainer.engine.distribution import Pass
from trainer.engine.loop_config import LoopConfig
from trainer.engine.optimizers import build_optimizer
from trainer.nano.autoencoder import AutoencoderConfig, AutoencoderTask
from trainer.segsr.scenes import Options, write_scenes

from . import stage2_nets, test_distill, test_few_steps, test_segsr_trainer, test_stage1
from .fake_device import FakeDevice, Watch
from .test_fake_device import check

DEVICES = {"cuda:0": "mixed", "mps:0": "fp32", "xpu:0": "bf16"}
"""And the precision that is tried on each."""
COPIES = {"stage1": (38, 0), "stage2": (47, 7), "distill": (72, 8), "critic": (50, 4), "segsr": (42, 5)}
COPIES |= {"autoencoder": (1, 0)}
"""Copies to the device and to the host in a step of one image, at most: crop, kernels, noises and the degradation's
tables there, and in stage 2 and what builds on it latents, pictures, soft prompt and text, which are kept on the host,
in both directions."""
slow = pytest.mark.slow


@pytest.fixture(params=["cuda:0", pytest.param("mps:0", marks=slow), pytest.param("xpu:0", marks=slow)])
def place(request: pytest.FixtureRequest) -> FakeDevice:
    return FakeDevice(request.param)


def moved(task: Any, place: FakeDevice) -> Any:
    """The task with all its networks there, and told so."""
    if hasattr(task, "text_states"):
        task.text_states([""])  # hashes the text encoder's weights, once in a training
    if hasattr(task, "acp"):
        task.acp = place.tensor(task.acp)
    for owner in (task, getattr(task, "batches", None)):
        if owner is not None:
            loop = replace(owner.config.loop, device=str(place.device), precision=DEVICES[str(place.device)])
            owner.config, owner.device = replace(owner.config, loop=loop), place.device
    for module in networks(task):
        place.module(module)
    return task


def networks(task: Any) -> list[nn.Module]:
    """Every network that a task holds, itself or among its `Networks`."""
    held = list(vars(task).values())
    for value in held:
        if is_dataclass(value) and not isinstance(value, type):
            held += [getattr(value, field.name) for field in fields(value)]
    return [value for value in held if isinstance(value, nn.Module)]


def step(task: Any, place: FakeDevice) -> Watch:
    """One optimizer step; returns what was done in it."""
    loop = task.config.loop
    module = Pass(task)
    learnt = [p for p in module.parameters() if p.requires_grad]
    optimizer = build_optimizer(loop.optimizer, learnt, learning_rate=1e-4, weight_decay=0.01)
    with place.watched() as watch:
        with loop.autocast():
            loss, _ = module(0)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learnt, loop.max_grad_norm)
        optimizer.step()
    there = [loss, norm, *learnt, *(p.grad for p in learnt if p.grad is not None)]
    assert {tensor.device for tensor in there} == {place.device}
    assert sum(p.grad is not None for p in learnt) > 0.5 * len(learnt)
    check(watch)
    return watch


def stage1(photos: Path) -> Any:
    return test_stage1.make_task(photos, replace(test_stage1.debug(batch_size=1), degradation_group=1))


def stage2(photos: Path) -> Any:
    return stage2_nets.small_task(photos, stage2_nets.config(batch_size=1))


def distill(photos: Path) -> Any:
    """Every term, a teacher of one step, and an autoencoder whose activations are computed again."""
    return test_distill.task(photos.parent, loop=ONE_IMAGE, teacher_steps=4, gradient_checkpointing=True)


def critic(photos: Path) -> Any:
    """U-Net, ControlNet and decoder against a critic."""
    return test_few_steps.judged(photos.parent, loop=ONE_IMAGE)


def segsr(photos: Path) -> Any:
    """The joint loss of an image that comes to its timestep by a step of the networks."""
    return test_segsr_trainer.make_task(photos.parent / "scenes", loop=ONE_IMAGE, degradation_group=1, own=1.0)


def autoencoder(photos: Path) -> Any:
    """The small model's decoder, whole."""
    config = AutoencoderConfig(loop=ONE_IMAGE, crop=32, grow=(0, 0))
    return AutoencoderTask(config, Crops(read_photos(photos), size=config.crop))


TASKS = {task.__name__: task for task in (stage1, stage2, distill, critic, segsr, autoencoder)}
ONE_IMAGE = LoopConfig(steps=2, batch_size=1, learning_rate=1e-3, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_scenes(Options(out=folder / "scenes", count=2, size=64))
    return stage2_nets.write_photos(folder, count=2)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_waits_for_nothing_and_copies_little(place: FakeDevice, name: str, photos: Path) -> None:
    watch = step(moved(TASKS[name](photos), place), place)
    there, back = COPIES[name]
    assert watch.copies["to the device"] <= there
    assert watch.copies["to the host"] <= back


class Impatient(Pass):
    """Reads the loss before the backward pass."""

    def forward(self, number: int) -> tuple[Tensor, Any]:
        loss, figures = super().forward(number)
        return loss, {**figures, "loss": loss.item()}


def test_reading_a_value_within_the_step_is_noticed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = FakeDevice("cuda:0")
    monkeypatch.setattr(f"{__name__}.Pass", Impatient)
    with pytest.raises(DataDependentOutputException):
        step(moved(stage1(photos), place), place)


def test_what_stays_on_the_cpu_is_noticed(photos: Path) -> None:
    place = FakeDevice("cuda:0")
    task = moved(stage1(photos), place)
    teacher = task.teacher.state_dict()  # all the device's
    name = next(name for name, tensor in teacher.items() if tensor.ndim == 2)
    owner, _, last = name.rpartition(".")
    setattr(task.teacher.get_submodule(owner), last, nn.Parameter(torch.zeros(teacher[name].shape)))
    with pytest.raises(RuntimeError, match="device"):
        step(task, place)
