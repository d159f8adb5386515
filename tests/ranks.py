"""Training in several processes, for tests: a fresh interpreter imports torch once and forks the ranks.

    python -m tests.ranks SCENARIO FOLDER

Whatever a run would import on its way is imported before, too, so that a forked one costs next to nothing.
The process that runs pytest cannot fork them itself: autograd does not survive a fork once it has been used.
"""

from __future__ import annotations

import functools
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate.state  # noqa: F401 - for the forked runs
import torch
import torch._dynamo
import torch.distributed.tensor
from torch import Tensor, nn

import trainer.engine.loop
from seesr_core.errors import SeeSRError
from trainer.data.order import by_image, seeded
from trainer.data.photos import read_photos
from trainer.engine.checkpoints import Checkpoints
from trainer.engine.distribution import make_accelerator
from trainer.engine.loop import train
from trainer.engine.loop_config import LoopConfig
from trainer.engine.state import State
from trainer.engine.zero import ZeroState
from trainer.stage2.command import train_control

from .golden import ROOT
from .stage2_nets import config, small_networks

TOY = LoopConfig(
    steps=60, batch_size=4, learning_rate=0.02, ema=0.9, device="cpu", log_every=1, save_every=1, sample_every=0
)


class ToyTask:
    """Regression with dropout on vectors that are drawn by image."""

    def __init__(self, config: LoopConfig, *, at_step: Callable[[int], object] = lambda step: None) -> None:
        self.config, self.at_step = config, at_step
        self.trained = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
        for parameter in self.trained.parameters():
            parameter.data.normal_(generator=seeded(1, parameter.numel()))

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        self.at_step(step // self.config.parts)
        rows = [torch.randn(4, generator=g) for g in by_image(2, images=self.config.images(step))]
        x = torch.stack(rows)
        return (self.trained(x) - x.sum(1, keepdim=True)).square().mean(), {}

    def sample(self, folder: Path, step: int) -> None:
        pass


def run(scenario: str, folder: Path, timeout: float = 1800) -> None:
    """Carry out a scenario in an interpreter of its own."""
    command = [sys.executable, "-m", "tests.ranks", scenario, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def _fork(action: Callable[[], object], rank: int = 0, count: int = 1, port: int = 0) -> int:
    pid = os.fork()
    if pid:
        return pid
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), **addresses})
    status = 1
    try:
        action()
        status = 0
    except BaseException as error:
        sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(status)


def _forked(count: int, action: Callable[[], object]) -> list[int]:
    """The exit statuses of `count` ranks that do the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [_fork(action, rank, count, port) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def equal(folder: Path) -> None:
    """Stage 2 in 1, 2 and 4 processes with one global batch."""
    for count in (1, 2, 4):
        assert _forked(count, functools.partial(_stage2, folder, 4 // count, f"{count}")) == [0] * count


def _stage2(folder: Path, accumulation: int, name: str, sample_every: int = 0) -> None:
    settings = config(steps=2, batch_size=4, accumulation=accumulation, sample_every=sample_every, save_every=2)
    train_control(settings, small_networks(), read_photos(folder / "photos.jsonl"), folder / name, base="tiny")


def toy(folder: Path) -> None:
    """A toy with dropout in 1, 2 and 4 processes."""
    for count in (1, 2, 4):
        assert _forked(count, functools.partial(_toy, 4 // count, folder / f"{count}")) == [0] * count


def _toy(accumulation: int, out: Path, steps: int = 6) -> None:
    config = replace(TOY, steps=steps, accumulation=accumulation, save_every=3)
    train(ToyTask(config), config, out)


def fsdp2(folder: Path) -> None:
    """A toy in one process, and sharded by accelerate over two, which are interrupted half-way."""
    assert _forked(1, functools.partial(_toy, 2, folder / "whole")) == [0]
    for steps in (3, 6):
        action = functools.partial(_toy, 1, folder / "sharded", steps)
        assert _forked(2, functools.partial(_as_fsdp2, action)) == [0, 0]


def fsdp2_stage2(folder: Path) -> None:
    """Stage 2 with its pictures and its export, whole and sharded block by block."""
    stage2 = functools.partial(_stage2, folder, sample_every=2)
    assert _forked(1, functools.partial(stage2, 4, "whole")) == [0]
    assert _forked(2, functools.partial(_as_fsdp2, functools.partial(stage2, 2, "sharded"), BLOCKS)) == [0, 0]


BLOCKS = ["BasicTransformerBlock", "ResnetBlock2D"]
"""What the shipped configuration shards by."""


def _as_fsdp2(action: Callable[[], object], blocks: Sequence[str] = ()) -> None:
    """accelerate shards on GPUs only; told that the CPU is one, it shards over gloo just as well."""
    from accelerate import Accelerator, DistributedType
    from accelerate.state import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    prepare = Accelerator.prepare
    how = {"auto_wrap_policy": "transformer_based_wrap" if blocks else "no_wrap"}
    plugin: Any = functools.partial(FullyShardedDataParallelPlugin, fsdp_version=2, cpu_ram_efficient_loading=False)

    def sharding(config: LoopConfig) -> Any:
        accelerator: Any = make_accelerator(config)
        accelerator.state.fsdp_plugin = plugin(**how, transformer_cls_names_to_wrap=list(blocks) or None)
        for state in (accelerator.state._shared_state, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        return accelerator

    def prepared(self: Any, *parts: Any) -> Any:
        result = prepare(self, *parts)
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in result[0].parameters())
        return result

    with (
        mock.patch.object(trainer.engine.loop, "make_accelerator", sharding),
        mock.patch.object(Accelerator, "prepare", prepared),
    ):
        action()


class BrokenTask(ToyTask):
    """A toy of which one image in step 3 and one in step 5 are not finite."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        loss, figures = super().loss(step)
        broken = {3 * self.config.batch_size: math.nan, 6 * self.config.batch_size - 1: math.inf}
        return loss * math.prod(broken.get(image, 1.0) for image in self.config.images(step)), figures


def _broken(accumulation: int, out: Path, steps: int, precision: str) -> None:
    config = replace(TOY, steps=steps, accumulation=accumulation, precision=precision, save_every=4, warmup=4)
    train(BrokenTask(config), config, out)


def zero(folder: Path) -> None:
    """A toy with steps that are not finite: in one process, and by ZeRO over two, at one go and interrupted; what ZeRO
    left, one process takes further."""
    import deepspeed  # noqa: F401 - for the forked runs

    for stage, precision in ((1, "fp32"), (2, "bf16")):
        out, broken = folder / f"{stage}", functools.partial(_broken, precision=precision)
        assert _forked(1, functools.partial(broken, 4, out / "alone", 10)) == [0]
        for name, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
            action = functools.partial(broken, 2, out / name, steps)
            assert _forked(2, functools.partial(_as_zero, action, stage)) == [0, 0]
        assert _forked(1, functools.partial(broken, 4, out / "parts", 10)) == [0]


def zero_stage2(folder: Path) -> None:
    """Stage 2 with its pictures and its export, whole and by ZeRO-2."""
    import deepspeed  # noqa: F401 - for the forked runs

    stage2 = functools.partial(_stage2, folder, sample_every=2)
    assert _forked(1, functools.partial(stage2, 4, "whole")) == [0]
    assert _forked(2, functools.partial(_as_zero, functools.partial(stage2, 2, "sharded"))) == [0, 0]


def _as_zero(action: Callable[[], object], stage: int = 2) -> None:
    """What the launcher says to a process when its file asks for DeepSpeed."""

    def halved(parameters: Mapping[str, Tensor], *more: Any) -> State:
        state = ZeroState(parameters, *more)
        assert 0.5 <= state._slice.numel() / sum(p.numel() for p in parameters.values()) < 0.51
        return state

    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": f"{stage}"}
    with mock.patch.object(trainer.engine.loop, "ZeroState", side_effect=halved) as made:
        action()
    assert made.called


def lost(folder: Path) -> None:
    """Rank 1 of 2 is killed in the middle; rank 0 writes down what it is told."""

    def die(step: int) -> None:
        if os.environ["RANK"] == "1" and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        try:
            train(ToyTask(TOY, at_step=die), TOY, folder / "run")
        except SeeSRError as error:
            (folder / "told.txt").write_text(str(error), "utf-8")
            raise

    assert _forked(2, work) == [1, -signal.SIGKILL]


def killed(folder: Path) -> None:
    """A run that is killed at ten random moments and started again each time, and one that is left alone."""
    chance = random.Random(0)
    for kill in range(10):
        pid = _fork(lambda: train(ToyTask(TOY), TOY, folder / "killed"))
        wanted = 5 * kill + chance.randrange(5)
        while _lines(folder / "killed") < wanted:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run ended before it could be killed"
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for name in ("killed", "whole"):
        assert _forked(1, functools.partial(train, ToyTask(TOY), TOY, folder / name)) == [0]


def _lines(out: Path) -> int:
    log = out / "log.jsonl"
    return len(log.read_text("utf-8").splitlines()) if log.exists() else 0


def sharded(folder: Path) -> None:
    """Parameters, averages and moments that FSDP2 divides between two processes: saved, read back, gone on with."""
    assert _forked(2, lambda: _sharded(folder)) == [0, 0]


def _sharded(folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    state = _sharded_state()
    _steps(state, 0, 2)
    tensors = state.tensors()
    if dist.get_rank() == 0:
        Checkpoints(folder).save(tensors, 2, {}, {})
    dist.barrier()
    _steps(state, 2, 4)
    again = _sharded_state()
    saved = Checkpoints(folder).newest_whole()
    assert saved is not None
    again.load(saved.tensors())
    _steps(again, 2, 4)
    expected, found = state.tensors(), again.tensors()
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    dist.destroy_process_group()


def _sharded_state() -> State:
    from torch.distributed.fsdp import fully_shard

    task: Any = ToyTask(TOY)
    fully_shard(task.trained)
    parameters = dict(task.trained.named_parameters())
    state = State(
        parameters, {k: p.detach().clone() for k, p in parameters.items()}, torch.optim.AdamW(parameters.values())
    )
    state.parameters = _WithModule(parameters, task.trained)
    return state


class _WithModule(dict[str, Any]):
    """Parameters that know their module."""

    def __init__(self, parameters: Mapping[str, Any], module: nn.Module) -> None:
        super().__init__(parameters)
        self.module = module.eval()


def _steps(state: State, start: int, end: int) -> None:
    for step in range(start, end):
        x = torch.randn(4, 4, generator=seeded(3, step, int(os.environ["RANK"])))
        state.parameters.module(x).square().mean().backward()  # type: ignore[attr-defined]
        state.optimizer.step()
        state.optimizer.zero_grad()
        torch._foreach_lerp_(list(state.average.values()), [p.detach() for p in state.parameters.values()], 0.1)


SCENARIOS = {
    action.__name__: action for action in (equal, toy, fsdp2, fsdp2_stage2, zero, zero_stage2, lost, killed, sharded)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
