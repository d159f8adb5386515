"""How fast stage 2 trains, and where the time goes, against a plain loop that does the same arithmetic.

    python -m trainer.bench --size nano --json bench.json

All loops run in turn in one process, on photos and weights made from a seed. The plain loop is what one writes first:
the published sharpening, every image degraded, encoded and looked at by the tagger alone, every prompt encoded anew,
and the optimizer's parameters taken one after the other. `ours` has its losses to rounding; `grouped` lets four images
share what the degradation decides once a batch, as the recipe nano does; `cached` draws prepared batches again.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from seesr_core.files import atomic_write

from . import command
from .data import read_photos
from .degradation import DegradationConfig, SharpenConfig
from .distribution import local_device
from .losses import noise_loss
from .nano.autoencoder import build_autoencoder
from .nano.prior import PriorConfig, PriorSizes, build_prior
from .nano.tagger import tagger_config
from .nano.text import train_tokenizer
from .order import seeded
from .pairs import make_crops
from .pool import Prepared
from .recipes import Stage2Config, stage2_nano
from .stage2 import Networks, Stage2Task, tag_prompts

log = logging.getLogger(__name__)

WORDS = ("cat", "dog", "car", "tree", "house", "sky", "sea", "person")
PHASES = ("data", "degradation", "frozen", "trained", "optimizer")
SIZES = {
    "nano": PriorSizes(),
    "mid": PriorSizes(channels=(128, 256, 512), attention=(True, True, True), layers=2, text_width=512, text_layers=6),
}
"""The embedded small model, and one about ten times its size."""


@dataclass(kw_only=True)
class Options:
    """Measure images per second."""

    size: Literal["nano", "mid"] = "nano"
    """Which networks."""
    steps: int = 4
    """Measured steps of each loop; one more warms up."""
    batch_size: int = 8
    """Images per step."""
    crop: int = 128
    """Side of the crops in pixels."""
    workers: int = 2
    """Threads that read photos ahead, not in the plain loop."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks."""
    json: Path | None = None
    """Write the figures there, too."""


@dataclass(slots=True)
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens within the block."""
        start = _now()
        yield
        self.seconds[name] += _now() - start


@dataclass(kw_only=True, slots=True)
class Measured:
    """What a loop took."""

    images_per_second: float
    """Over the measured steps."""
    shares: dict[str, float]
    """Share of the time by phase."""
    losses: list[float]
    """Of every step, to see that the loops do the same."""


class TimedTask(Stage2Task):
    """Stage 2 with its parts timed."""

    clock: Clock

    def step(self, number: int, optimizer: torch.optim.Optimizer) -> float:
        """One whole training step; returns its loss."""
        loop = self.config.loop
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=loop.precision == "bf16"):
            batch = self.batch(number)
            with self.clock.phase("frozen"):
                text = self.text(batch.prompts)
            with self.clock.phase("trained"):
                loss = noise_loss(self.predict(self.noisy(batch), batch, text), batch.noise)
        with self.clock.phase("trained"):
            loss.backward()
        with self.clock.phase("optimizer"):
            optimizer.step()
        return loss.item()

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Text states."""
        return self.text_states(prompts)

    def _prepare(self, number: int) -> Prepared:
        with self.clock.phase("data"):
            crops, photos = self.crops.batch(number, self.config.loop.micro_batch)
        return self._looked_at(crops, photos, number)

    def _looked_at(self, crops: Tensor, photos: list[int], number: int) -> Prepared:
        first = self.config.loop.images(number)[0]
        with self.clock.phase("degradation"):
            pair = self.degraded(crops, first)
        with self.clock.phase("frozen"):
            return self.encoded(pair, photos, range(first, first + len(photos)))


class PlainTask(TimedTask):
    """The same arithmetic image by image."""

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Every prompt by itself."""
        return torch.cat([self.encode_text([prompt]) for prompt in prompts])

    def _looked_at(self, crops: Tensor, photos: list[int], number: int) -> Prepared:
        first, rows = self.config.loop.images(number)[0], []
        for index, photo in enumerate(photos):
            with self.clock.phase("degradation"):
                pair = self.degraded(crops[index : index + 1], first + index)
            with self.clock.phase("frozen"):
                rows.append(self.encoded(pair, [photo], range(first + index, first + index + 1)))
        return Prepared(*(torch.cat([getattr(row, name) for row in rows]) for name in Prepared.__slots__))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: bench(tyro.cli(Options, args=argv, prog="python -m trainer.bench")))


def bench(options: Options) -> dict[str, Measured]:
    """Measure all loops; logs and returns the figures."""
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder), count=2 * options.batch_size)
        config = _config(options)
        plain = replace(config, degradation=replace(config.degradation, sharpen=SharpenConfig()))
        grouped, cached = replace(config, degradation_group=4), replace(config, pool=1 + options.steps)
        loops: dict[str, Callable[[], Measured]] = {
            "plain": lambda: _measure(PlainTask, plain, photos, options, workers=0),
            "ours": lambda: _measure(TimedTask, config, photos, options, workers=options.workers),
            "grouped": lambda: _measure(TimedTask, grouped, photos, options, workers=options.workers),
            "cached": lambda: _measure(TimedTask, cached, photos, options, workers=options.workers, rounds=2),
        }
        found = {name: measure() for name, measure in loops.items()}
    for line in _lines(found):
        log.info("%s", line)
    if options.json:
        _write(options, found)
    return found


def _config(options: Options) -> Stage2Config:
    nano = stage2_nano()
    loop = replace(
        nano.loop, steps=options.steps, batch_size=options.batch_size, precision=options.precision, sample_every=0
    )
    degradation = DegradationConfig(sharpen=SharpenConfig(fast=True), quantize=True)
    return replace(nano, loop=loop, crop=options.crop, degradation=degradation, degradation_group=1, pool=0)


def _measure(
    kind: type[TimedTask], config: Stage2Config, photos: Path, options: Options, *, workers: int, rounds: int = 1
) -> Measured:
    """The steps after the first one; of several rounds over the same steps the last one."""
    # Photos are read from disk, as they are where they do not fit into memory.
    crops = make_crops(read_photos(photos), config, workers=workers, memory=0)
    task = kind(config, networks(options.size, config), crops, tag_prompts(crops.photos))
    task.clock = Clock()
    trained = [p for p in task.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.loop.learning_rate, foreach=kind is not PlainTask)
    for _ in range(rounds):
        losses = [task.step(0, optimizer)]
        task.clock, start = Clock(), _now()
        losses += [task.step(number, optimizer) for number in range(1, 1 + options.steps)]
        seconds = _now() - start
    shares = {name: spent / seconds for name, spent in task.clock.seconds.items()}
    return Measured(images_per_second=options.steps * options.batch_size / seconds, shares=shares, losses=losses)


def networks(size: str, config: Stage2Config) -> Networks:
    """Networks of a size with weights from a seed; ControlNet and RCA are trained."""
    from seesr_core.dape import DAPE
    from seesr_core.rca import rca_parameters

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
    plain = found["plain"].images_per_second
    return [
        f"{name:<8}{loop.images_per_second:9.2f} images/s  {loop.images_per_second / plain:5.2f} x plain   "
        + "  ".join(f"{phase} {share:.0%}" for phase, share in loop.shares.items())
        for name, loop in found.items()
    ]


def _write(options: Options, found: dict[str, Measured]) -> None:
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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
