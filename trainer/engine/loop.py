"""The training loop that every stage shares, readable from top to bottom.

All that is random about an image derives from (seed, number of the image), and a checkpoint holds weights, optimizer
and how far the run has come. The same command therefore goes on after an interruption with the losses of an
uninterrupted run, in fp32 on one machine bit for bit; and the number of processes changes the losses by rounding only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from seesr_core.errors import DataError, ResourceError

from ..data.order import Stream, scoped_seed
from .checkpoints import Checkpoints, Saved
from .distribution import Pass, gathered, make_accelerator
from .dropout import DropoutByImage
from .identity import check_same_run
from .journal import Figures, Journal, Progress, RunningMeans, write_run
from .lock import Watch, held, leave
from .loop_config import LoopConfig
from .needs import check_packages
from .optimizers import begin, build_optimizer, count_from, counters, finish, has_modes
from .sharding import unsharded, whole
from .state import State
from .zero import ZeroState, configure

if TYPE_CHECKING:
    from accelerate import Accelerator


log = logging.getLogger(__name__)


class Task(Protocol):
    """What a stage has to offer to the loop."""

    @property
    def trained(self) -> nn.Module:
        """Holds every trained parameter (frozen ones have `requires_grad=False` and are not saved)."""

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """The mean loss of part `step`, with further figures for the log.

        Part n consists of the images n·m … (n + 1)·m − 1 with m = `LoopConfig.micro_batch`; a step consists of one part
        unless it is divided. Deterministic in the numbers of the images.
        """

    def sample(self, folder: Path, step: int) -> Mapping[str, float] | None:
        """Write sample pictures of the present state into `folder`; returns figures of a validation, if any."""


def train(task: Task, config: LoopConfig, out: Path, *, identity: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Run (or resume) a stage; returns the trained tensors, averaged if `ema` is on.

    Args:
        task: what is trained.
        config: how.
        out: run folder; holds `run.json`, `log.jsonl`, `validation.jsonl`, `checkpoint.safetensors`, `checkpoints/`,
            `samples/`, `tensorboard/`.
        identity: facts that must not change between start and resume (sizes, data); a difference is refused.

    Raises:
        DataError: the folder holds another run or is in use, or gradients were not finite too often.
        ResourceError: the disk is full, or another process of the run has ended.
    """
    check_packages(config)
    accelerator = make_accelerator(config)
    with _alone(out, accelerator):
        return Training(task, config, out, accelerator, identity or {}).to_the_end()


@contextlib.contextmanager
def _alone(out: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder, and watch the other processes if there are any."""
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(held(out))
        if accelerator.num_processes == 1:
            yield
            return
        watch = _watch(out, accelerator)
        try:
            yield
            accelerator.wait_for_everyone()
        except RuntimeError as error:
            if sentence := watch.lost(patience=5.0):
                raise ResourceError(sentence) from error
            raise
        watch.finish()


def _watch(out: Path, accelerator: Accelerator) -> Watch:
    """Begin to look after the other processes, once all of them are there."""
    try:
        accelerator.wait_for_everyone()
        watch = Watch(out / ".ranks", accelerator.process_index, accelerator.num_processes, leave)
        accelerator.wait_for_everyone()
    except RuntimeError as error:
        raise ResourceError("Another process of the run ended before it began; its own message says why.") from error
    watch.start()
    return watch


class Training:
    """A stage under way: what the loop keeps between its steps.

    Args:
        task: what is trained.
        config: how.
        out: run folder.
        accelerator: set up for `config`.
        identity: facts that must not change between start and resume.
    """

    def __init__(
        self, task: Task, config: LoopConfig, out: Path, accelerator: Accelerator, identity: Mapping[str, Any]
    ) -> None:
        self.task, self.config, self.out, self.accelerator = task, config, out, accelerator
        settings = {**asdict(config), "precision": config.resolve_precision()}
        self.facts = json.loads(json.dumps({**settings, **identity}))
        self.model, self.state = _prepare(task, config, accelerator)
        self.checkpoints = Checkpoints(out, config.keep_last)
        saved = _resume(self.checkpoints, self.state, self.facts)
        self.done = saved.step if saved else 0
        notes = saved.notes if saved else {}
        self.main: bool = accelerator.is_main_process
        # The meter of a checkpoint has the figures of all processes.
        self.meter = RunningMeans(**notes.get("meter", {})) if self.main else RunningMeans()
        count_from(self.state.optimizer, notes.get("optimizer", {}))  # it says which weights the checkpoint has
        begin(self.state.optimizer)
        self.guard = _Guard(config.max_skipped, total=notes.get("skipped", 0))
        self.journal = Journal(out, writes=self.main, wandb=config.wandb, facts=self.facts)
        self.clock = time.monotonic()

    def to_the_end(self) -> dict[str, Tensor]:
        """All steps that are left; returns the trained tensors."""
        config = self.config
        if self.main:
            write_run(self.out, self.facts, processes=self.accelerator.num_processes, device=config.resolve_device())
        self.journal.begin(self.done)
        size = config.batch_size
        progress = Progress(self.done * size, config.steps * size, shown=self.main)
        for step in range(self.done, config.steps):
            loss = self.step(step)
            progress.add(size, loss)
            self.done = step + 1
            if self._due(config.log_every):
                self.log()
            if self._due(config.save_every):
                self.save()
            if config.sample_every and self._due(config.sample_every):
                self.sample()
        progress.close()
        self.journal.close()
        finish(self.state.optimizer)
        result = self.state.average or self.state.parameters
        return {name: whole(tensor.detach()).clone() for name, tensor in result.items()}

    def step(self, step: int) -> float:
        """One optimizer step; returns the mean loss of this process's parts."""
        optimizer, losses = self.state.optimizer, []
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr_at(step)
        for part in _parts(step, self.config, self.accelerator):
            with _draws(self.config, step, part), self.accelerator.accumulate(self.model):
                loss, figures = self.model(part)
                self.accelerator.backward(loss)
            losses.append(loss.item())
            if math.isfinite(losses[-1]):
                self.meter.add({"loss": losses[-1], **figures})
        norm = self.accelerator.clip_grad_norm_(self.state.parameters.values(), self.config.max_grad_norm)
        norm = float(whole(norm))
        sound = self.guard.passes(norm, step, losses)
        if sound:
            self.meter.add({"grad_norm": norm})
        if sound or self.accelerator.scaler is not None:  # which skips the step by itself, and lowers its scale
            optimizer.step()
        if sound:
            _average(self.state, min(self.config.ema, (1 + step) / (10 + step)))
        return sum(losses) / len(losses)

    def _due(self, every: int) -> bool:
        return self.done % every == 0 or self.done == self.config.steps

    def log(self) -> None:
        """A line with the means since the last one."""
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        means = RunningMeans.merged(gathered(self.accelerator, self.meter.state())).means()
        images, rate = self.done * self.config.batch_size, self.config.lr_at(self.done - 1)
        line = {"step": self.done, "images": images, "lr": rate, "seconds": seconds}
        self.journal.write({**line, **means, **self.guard.figures()})
        self.meter.clear()

    def save(self) -> None:
        """Write a checkpoint."""
        meter = RunningMeans.merged(gathered(self.accelerator, self.meter.state()))
        tensors = self.state.tensors()
        if self.main:
            images = self.done * self.config.batch_size
            notes = {"meter": meter.state(), "skipped": self.guard.total, "images": images}
            notes["optimizer"] = counters(self.state.optimizer)
            self.checkpoints.save(tensors, self.done, self.facts, notes)
        self.accelerator.wait_for_everyone()

    def sample(self) -> None:
        """Pictures, and the figures of a validation; the best state is kept."""
        figures = _sample(self.task, self.model, self.state, self.out / "samples", self.done, self.accelerator)
        if figures:
            self.journal.write({"step": self.done, **figures}, kind="validation")
        if self.config.keep_best and self.checkpoints.is_best(figures, self.done):
            if not self._due(self.config.save_every):
                self.save()
            if self.main:
                self.checkpoints.mark_best(figures, self.done)
            self.accelerator.wait_for_everyone()
        self.clock = time.monotonic()


def _prepare(task: Task, config: LoopConfig, accelerator: Accelerator) -> tuple[nn.Module, State]:
    """The task's loss as a module that is parallel, compiled and in the recipe's precision, and what it trains."""
    from accelerate import DistributedType

    if config.tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    _compile(task, config)
    module = Pass(task, config.offload_activations)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        config.optimizer, trained, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    zero = accelerator.distributed_type is DistributedType.DEEPSPEED
    if zero:
        configure(accelerator, module, config)
    model, optimizer = accelerator.prepare(module, optimizer)
    # Sharding puts other parameters in the place of those that were there.
    parameters = {name: p for name, p in module.trained.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else {}
    return model, (ZeroState if zero else State)(parameters, average, optimizer)


def _compile(task: Task, config: LoopConfig) -> None:
    """Compile the parts in place, so that their names in checkpoints stay."""
    if config.compile in ("frozen", "all"):
        for module in getattr(task, "frozen", ()):
            module.compile(backend=config.compile_backend)
    if config.compile in ("trained", "all"):
        parts = task.trained.values() if isinstance(task.trained, nn.ModuleDict) else [task.trained]
        for module in parts:
            module.compile(backend=config.compile_backend)


def _parts(step: int, config: LoopConfig, accelerator: Accelerator) -> Iterator[int]:
    """The numbers of the parts of a step that this process computes."""
    config.micro_batch  # noqa: B018 - refuses what cannot be divided
    first = step * config.parts + accelerator.process_index
    return iter(range(first, (step + 1) * config.parts, accelerator.num_processes))


@contextlib.contextmanager
def _draws(config: LoopConfig, step: int, part: int) -> Iterator[None]:
    """Within the block, dropout is drawn by image; compiled networks draw it by the part of the batch."""
    if config.compile == "none":
        with scoped_seed(config.seed, Stream.DROPOUT, step), DropoutByImage(config.images(part)):
            yield
    else:  # torch.compile cannot trace a mode that makes generators
        with scoped_seed(config.seed, Stream.DROPOUT, part):
            yield


class _Guard:
    """Lets no step with gradients that are not finite through, and not too many of them in a row."""

    def __init__(self, most: int, total: int) -> None:
        self.most, self.total, self.in_a_row = most, total, 0

    def passes(self, norm: float, step: int, losses: list[float]) -> bool:
        """Whether the step is sound; the norm is the same on all processes, so they agree.

        Raises:
            DataError: too many unsound ones in a row.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        log.warning("skipped step %d: its loss is %s, the norm of its gradients %s", step, losses, norm)
        if self.in_a_row > self.most:
            raise DataError(
                f"{self.in_a_row} steps in a row had gradients that are not finite, the last one step {step} with a "
                f"loss of {sum(losses) / len(losses)}; lower the learning rate, or look at the data of these steps."
            )
        return False

    def figures(self) -> dict[str, int]:
        """Figures for the log: how many steps were skipped since the beginning."""
        return {"skipped": self.total} if self.total else {}


def _average(state: State, decay: float) -> None:
    if state.average:
        current = [state.parameters[name].detach() for name in state.average]
        torch._foreach_lerp_(list(state.average.values()), current, 1 - decay)


def _sample(
    task: Task, model: nn.Module, state: State, folder: Path, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Pictures and figures of the averaged weights; sharded networks need every process for that, others just one."""
    from accelerate import DistributedType

    figures: Mapping[str, float] | None = None
    if accelerator.is_main_process or accelerator.distributed_type is DistributedType.FSDP:
        with _weights(state), unsharded(model), torch.no_grad():
            figures = task.sample(folder, step)
    return dict(gathered(accelerator, dict(figures or {}))[0])


@contextlib.contextmanager
def _weights(state: State) -> Iterator[None]:
    """Within the block the parameters hold what would be exported: their moving average, or what the optimizer means
    for use. Then they have the bits that they had."""
    parameters, swaps = state.parameters, has_modes(state.optimizer) and not state.average
    kept = {name: parameters[name].detach().clone() for name in (parameters if swaps else state.average)}
    try:
        for name, tensor in state.average.items():
            parameters[name].data.copy_(tensor)
        if swaps:
            finish(state.optimizer)
        yield
    finally:
        if swaps:
            begin(state.optimizer)
        for name, tensor in kept.items():
            parameters[name].data.copy_(tensor)


def _resume(checkpoints: Checkpoints, state: State, facts: Mapping[str, Any]) -> Saved | None:
    """Load the newest whole checkpoint, if there is any."""
    saved = checkpoints.newest_whole()
    if saved is None:
        return None
    check_same_run(checkpoints.folder, saved.facts, facts)
    state.check(saved.shapes, saved.path)
    state.load(saved.tensors())
    log.info("resuming %s at step %d", checkpoints.folder, saved.step)
    return saved
