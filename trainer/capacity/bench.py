"""How fast stage 2 trains, and where the time goes, against a plain loop that does the same arithmetic.

    python -m trainer.bench --size nano --json bench.json

The loops take turns step by step in one process, on photos and weights made from a seed. The plain loop is what one
writes first with diffusers: the published degradation image by image, then every frozen network looks at the whole
batch and encodes every prompt anew, and torch's own AdamW. `ours` has its losses to rounding; `grouped` lets four
images share what the degradation decides once a batch, as the recipe nano does; `cached` draws prepared batches again.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from seesr_core.method.losses import noise_loss
from seesr_core.runtime.files import atomic_write

from ..data.order import seeded
from ..data.pairs import make_crops
from ..data.photos import read_photos
from ..data.pool import Prepared
from ..degradation import DegradationConfig, Pair, SharpenConfig
from ..engine import command
from ..engine.optimizers import build_optimizer
from ..engine.processes import local_device
from ..nano.autoencoder import build_autoencoder
from ..nano.prior import PriorConfig, PriorSizes, build_prior
from ..nano.tagger import tagger_config
from ..nano.text import train_tokenizer
from ..stage2.batches import Batches, tag_prompts
from ..stage2.networks import Networks
from ..stage2.recipes import Stage2Config, stage2_nano
from ..stage2.task import Stage2Task

log = logging.getLogger(__name__)

WORDS = ("cat", "dog", "car", "tree", "house", "sky", "sea", "person")
PHASES = ("data", "degradation", "frozen", "trained", "optimizer")
SIZES = {
    "nano": PriorSizes(),
    "mid": PriorSizes(channels=(128, 256, 512), attention=(True, True, True), layers=2, text_width=512, text_layers=6),
}
"""The embedded small model, and one about ten times its size."""


@dataclass(kw_only=True)
class BenchCommand:
    """Measure images per second."""

    size: Literal["nano", "mid"] = "nano"
    """Networks to measure."""
    steps: int = 5
    """Measured steps of each loop, after one or two to warm up."""
    batch_size: int = 8
    """Images per step."""
    crop: int = 128
    """Side of the crops in pixels."""
    workers: int = 2
    """Threads that read photos ahead, not in the plain loop."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks."""
    clock: Literal["wall", "cpu"] = "wall"
    """What is counted: time, or the processor time of all threads, where other work shares the processors."""
    json: Path | None = None
    """JSON file to write the figures to, too."""


@dataclass(slots=True)
class Clock:
    """Seconds by phase."""

    read: Callable[[], float]
    """What tells the time."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    waited: float = 0.0
    """Seconds by the wall in which nothing could happen for want of photos."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens within the block."""
        start, wall = self.read(), _wall()
        yield
        self.seconds[name] += self.read() - start
        if name == "data":
            self.waited += _wall() - wall


@dataclass(kw_only=True, slots=True)
class Measured:
    """What a loop took."""

    images_per_second: float
    """Images per second at the median of the measured steps."""
    times_plain: float
    """How many times faster than the plain loop: the median over steps of the same images."""
    shares: dict[str, float]
    """Share of the time by phase."""
    waiting: float
    """Share of the time by the wall that was spent waiting for photos."""
    losses: list[float]
    """Loss of every step, to see that the loops do the same."""


class TimedBatches(Batches):
    """The batches of stage 2, their parts timed."""

    clock: Clock

    def prepare(self, number: int) -> Prepared:
        """Part `number` made anew."""
        with self.clock.phase("data"):
            crops, photos = self.crops.batch(number, self.config.loop.micro_batch)
        first = self.config.loop.images(number)[0]
        with self.clock.phase("degradation"):
            pair = self.degraded(crops, first)
        with self.clock.phase("frozen"):
            return self.encoded(pair, photos, range(first, first + len(photos)))


class TimedTask(Stage2Task):
    """Stage 2 with its parts timed."""

    batches_type = TimedBatches
    batches: TimedBatches

    def step(self, number: int, optimizer: torch.optim.Optimizer, clock: Clock) -> float:
        """One whole training step; returns its loss."""
        loop, self.batches.clock = self.config.loop, clock
        optimizer.zero_grad(set_to_none=True)
        with loop.autocast():
            batch = self.batch(number)
            with clock.phase("frozen"):
                text = self.text_states(batch.prompts)
            with clock.phase("trained"):
                loss = noise_loss(self.predict(batch, text), batch.noise)
        with clock.phase("trained"):
            loss.backward()
        with clock.phase("optimizer"):
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], loop.max_grad_norm)
            optimizer.step()
        return loss.item()


class PlainBatches(TimedBatches):
    """As `TimedBatches`, degraded image by image."""

    def degraded(self, crops: Tensor, first: int) -> Pair:
        """The pairs made of crops one after the other."""
        pairs = [super(PlainBatches, self).degraded(crop[None], first + index) for index, crop in enumerate(crops)]
        return Pair(**{name: torch.cat([getattr(pair, name) for pair in pairs]) for name in Pair.__slots__})


class PlainNetworks(Networks):
    """Networks that look at photos in the layout in which these come."""

    def codes(self, image_B3HW: Tensor) -> Tensor:
        """Latents of images in [0, 1]."""
        codes: Tensor = self.vae.encode(image_B3HW * 2 - 1).latents
        return codes


class PlainTask(TimedTask):
    """The same arithmetic without what this trainer does to be fast."""

    batches_type = PlainBatches

    @torch.no_grad()
    def text_states(self, prompts: Sequence[str]) -> Tensor:
        """Text states, every prompt encoded anew."""
        return self.networks.encode_text(prompts)


@dataclass(slots=True)
class Loop:
    """A training loop under measurement."""

    task: TimedTask
    optimizer: torch.optim.Optimizer
    read: Callable[[], float]
    """What tells the time."""
    clocks: list[Clock] = field(default_factory=list)
    """Clocks of the measured steps."""
    totals: list[float] = field(default_factory=list)
    """Seconds of the measured steps."""
    walls: list[float] = field(default_factory=list)
    """Wall-clock seconds of the measured steps."""
    losses: list[float] = field(default_factory=list)

    def step(self, number: int) -> None:
        """Carry out a step and measure it."""
        clock, start, wall = Clock(self.read), self.read(), _wall()
        self.losses.append(self.task.step(number, self.optimizer, clock))
        self.totals.append(self.read() - start)
        self.walls.append(_wall() - wall)
        self.clocks.append(clock)

    def forget(self) -> None:
        """Drop what was measured, but for the losses."""
        for measured in (self.clocks, self.totals, self.walls):
            measured.clear()

    def measured(self, plain: Loop) -> Measured:
        """The figures."""
        images, total = self.task.config.loop.batch_size, sum(self.totals)
        return Measured(
            images_per_second=images / median(self.totals),
            times_plain=median(slow / fast for slow, fast in zip(plain.totals, self.totals, strict=True)),
            shares={name: sum(clock.seconds[name] for clock in self.clocks) / total for name in PHASES},
            waiting=sum(clock.waited for clock in self.clocks) / sum(self.walls),
            losses=self.losses,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: bench(tyro.cli(BenchCommand, args=argv, prog="python -m trainer.bench")))


def bench(options: BenchCommand) -> dict[str, Measured]:
    """Measure all loops; logs and returns the figures."""
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), count=2 * options.batch_size)
        config = _config(options)
        plain = replace(config, degradation=replace(config.degradation, sharpen=SharpenConfig()))
        grouped, cached = replace(config, degradation_group=4), replace(config, pool=2)
        loops = {
            "plain": _loop(PlainTask, plain, photos, options),
            "ours": _loop(TimedTask, config, photos, options),
            "grouped": _loop(TimedTask, grouped, photos, options),
            "cached": _loop(TimedTask, cached, photos, options),
        }
        for loop in loops.values():
            for number in range(2 if loop is loops["cached"] else 1):
                loop.step(number)
            loop.forget()
        for number in range(1, 1 + options.steps):
            for loop in loops.values():
                loop.step(number)
    found = {name: loop.measured(loops["plain"]) for name, loop in loops.items()}
    for line in _lines(found):
        log.info("%s", line)
    if options.json:
        _write(options, found)
    return found


def _config(options: BenchCommand) -> Stage2Config:
    nano = stage2_nano()
    loop = replace(
        nano.loop, steps=options.steps, batch_size=options.batch_size, precision=options.precision, sample_every=0
    )
    degradation = DegradationConfig(sharpen=SharpenConfig(fast=True), quantize=True)
    return replace(nano, loop=loop, crop=options.crop, degradation=degradation, degradation_group=1, pool=0)


def _loop(kind: type[TimedTask], config: Stage2Config, photos: Path, options: BenchCommand) -> Loop:
    plain = kind is PlainTask
    # Photos are read from disk, as they are where they do not fit into memory.
    crops = make_crops(read_photos(photos), config, workers=0 if plain else options.workers, memory=0)
    nets = networks(options.size, config)
    if plain:
        nets = PlainNetworks(**{field.name: getattr(nets, field.name) for field in fields(nets)})
    task = kind(config, nets, crops, tag_prompts(crops.photos))
    trained = [p for p in task.trained.parameters() if p.requires_grad]
    rates = {"learning_rate": config.loop.learning_rate, "weight_decay": config.loop.weight_decay}
    optimizer = build_optimizer("adamw" if plain else "adamw-fused", trained, **rates)
    return Loop(task, optimizer, time.process_time if options.clock == "cpu" else _wall)


def networks(size: str, config: Stage2Config) -> Networks:
    """Networks of a size with weights from a seed; ControlNet and RCA are trained."""
    from seesr_core.dape import DAPE
    from seesr_core.method.rca import rca_parameters

    dape = DAPE(tagger_config(len(WORDS)))
    dape.initialize(seeded(1))
    nets = build_prior(PriorConfig(stage2=config, sizes=SIZES[size]), build_autoencoder(), train_tokenizer(WORDS), dape)
    nets.unet.requires_grad_(False)
    nets.text_encoder.requires_grad_(False)
    for parameter in rca_parameters(nets.unet).values():
        parameter.requires_grad_(True)
    return nets


def write_photos(folder: Path, *, count: int, side: int = 320) -> Path:
    """Photos of coloured blobs with tags, as JPEG; returns their list."""
    lines = []
    for number in range(count):
        blobs = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(blobs).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        tags = [WORDS[number % len(WORDS)], WORDS[(3 * number + 1) % len(WORDS)]]
        lines.append(json.dumps({"file": f"{number}.jpg", "tags": tags}))
    (folder / "photos.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "photos.jsonl"


def _lines(found: dict[str, Measured]) -> list[str]:
    return [
        f"{name:<8}{loop.images_per_second:9.2f} images/s  {loop.times_plain:5.2f} x plain   "
        + "  ".join(f"{phase} {share:.0%}" for phase, share in loop.shares.items())
        + f"   waits for data {loop.waiting:.1%}"
        for name, loop in found.items()
    ]


def _write(options: BenchCommand, found: dict[str, Measured]) -> None:
    device = local_device()
    about = {
        "options": {name: value for name, value in asdict(options).items() if name != "json"},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    assert options.json is not None
    with atomic_write(options.json) as temporary:
        loops = {name: asdict(loop) for name, loop in found.items()}
        temporary.write_text(json.dumps({**about, "loops": loops}, indent=1), "utf-8")


def _wall() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
