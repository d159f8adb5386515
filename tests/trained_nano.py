"""A few steps of stage 2 on the embedded small model, for tests of what comes out of it.

    python -m tests.trained_nano FOLDER

Writes the run to FOLDER/run, and to FOLDER/validation.safetensors what its last validation saw and made of the photo
FOLDER/pairs/LR/0.png: the noise that was drawn, the latent and the pictures.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from seesr_core.formats.base import load_base
from seesr_core.formats.control import read_control
from seesr_core.formats.ram import read_dape
from seesr_core.method.sampling import StepNoise
from seesr_core.pipeline import SeeSRPipeline
from trainer.data.photos import read_photos
from trainer.stage2.command import train_control
from trainer.stage2.networks import build_networks
from trainer.stage2.recipes import stage2_nano
from trainer.stage2.validation import Validation, read_pairs

NANO = Path(__file__).resolve().parents[1] / "seesr_core" / "nano"
SETTINGS: dict[str, Any] = {"steps": 4, "min_size": 64}
"""Settings of the validation, over the published ones."""
LR_SIZE = (24, 16)
STEPS = 3


def write_pictures(folder: Path) -> Path:
    """A pair to validate on and photos with tags, all from the example photo; returns the photos' list."""
    example = Image.open(NANO / "example.jpg").convert("RGB")
    for kind, factor in (("LR", 1), ("HR", 4)):
        (folder / "pairs" / kind).mkdir(parents=True)
        size = (LR_SIZE[0] * factor, LR_SIZE[1] * factor)
        example.resize(size, Image.Resampling.LANCZOS).save(folder / "pairs" / kind / "0.png")
    lines = []
    for number in range(2):
        example.rotate(90 * number).resize((96, 96)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "tags": ["food"]}))
    (folder / "photos.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "photos.jsonl"


class Recorder:
    """Keeps what passes through `SeeSRPipeline` and `StepNoise`: the last picture's."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.noise: list[Tensor] = []

    def start(self) -> None:
        """Look over the shoulder of both classes from now on."""
        sample, decode, draw = SeeSRPipeline.sample, SeeSRPipeline.decode, StepNoise.__call__

        def sampled(pipeline: Any, *args: Any) -> Tensor:
            self.noise = []
            return self._keep("latent", sample(pipeline, *args))

        def decoded(pipeline: Any, *args: Any, **more: Any) -> Tensor:
            return self._keep("decoded", decode(pipeline, *args, **more))

        def drawn(source: Any, like: Tensor) -> Tensor:
            self.noise.append(draw(source, like))
            return self.noise[-1]

        for owner, name, method in (
            (SeeSRPipeline, "sample", sampled),
            (SeeSRPipeline, "decode", decoded),
            (StepNoise, "__call__", drawn),
        ):
            setattr(owner, name, method)

    def _keep(self, name: str, value: Tensor) -> Tensor:
        self.kept[name] = value.clone()
        return value


class Shown(Validation):
    """Keeps the picture, too."""

    picture: Tensor

    def restore(self, networks: Any, pair: Any) -> Tensor:
        """As the validation does."""
        self.picture = super().restore(networks, pair)
        return self.picture


def main(folder: Path) -> None:
    """Train, validate after the last step, export."""
    torch.manual_seed(0)
    photos = read_photos(write_pictures(folder))
    recipe = stage2_nano()
    # A rate at which three steps show in the picture.
    loop = replace(
        recipe.loop, steps=STEPS, batch_size=2, learning_rate=1e-3, ema=0.0, precision="fp32", sample_every=STEPS
    )
    config = replace(recipe, loop=loop, crop=64, degradation_group=2, pool=0)
    dape, vocabulary = read_dape(NANO / "dape" / "dape-nano.safetensors")
    start = read_control(NANO / "seesr" / "seesr-nano-control.safetensors")
    networks = build_networks(load_base(NANO / "checkpoints" / "seesr-nano.safetensors"), dape, config, start)
    validation = Shown(read_pairs(folder / "pairs"), vocabulary, SETTINGS)
    recorder = Recorder()
    recorder.start()
    about: dict[str, Any] = {"base": "seesr-nano", "dtype": torch.float32}
    train_control(config, networks, photos, folder / "run", validation=validation, **about)
    tensors = {**recorder.kept, "noise": torch.cat(recorder.noise), "picture": validation.picture}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "validation.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
