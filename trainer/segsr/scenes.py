"""`python -m trainer.segsr.scenes`: drawn scenes in which a class fixes a texture, to try SegSR in small.

A scene is a background of bands and shapes that hide each other. What class a region is decides its texture exactly
(the textures lie on a grid of their own, so that whoever knows the class can draw them) and loosely its shape and its
colour. Blur, shrinking and noise take most of the texture from the LR picture and leave shape and colour.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from seesr_core.errors import SettingsError
from seesr_core.pictures.sizes import to_u8
from seesr_core.pictures.writing import save_picture
from seesr_core.runtime.files import atomic_write

from ..data.order import Stream, seeded
from ..degradation.ops import quantize, resize
from ..engine import command
from ..evaluate.pictures import as_picture
from .classes import write_classes, write_labels

SCALE = 4
_LOOSE = 0.25
"""Share of the regions whose shape or colour is another class's."""


@dataclass(kw_only=True, slots=True)
class Options:
    """Draw scenes with their degraded pictures and their labels."""

    out: Path
    """Folder to write: `HR`, `LR` and `labels`, `classes.json` and `manifest.json`."""
    count: int = 400
    """Number of scenes."""
    size: int = 128
    """Side of a scene in pixels, a multiple of 32."""
    seed: int = 0
    """What everything derives from; scenes of another seed are others."""
    blur: float = 3.0
    """Deviation of the blur in pixels of the scene."""
    noise: float = 0.04
    """Deviation of the noise in LR, in shares of white."""

    def __post_init__(self) -> None:
        if self.size < 64 or self.size % 32:
            raise SettingsError(f"The side of a scene must be a multiple of 32 from 64 on, not {self.size}.")
        if self.count < 1:
            raise SettingsError(f"At least one scene must be drawn, not {self.count}.")


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pixels' centres, (size, 1) and (1, size)."""
    centres = torch.arange(size) + 0.5
    return centres[:, None], centres[None]


def _wave(place: Tensor, period: float) -> Tensor:
    return (2 * math.pi * place / period).cos()


def _bricks(y: Tensor, x: Tensor) -> Tensor:
    shifted = x + 4.0 * ((y // 8) % 2)
    joint = ((y % 8) < 2) | ((shifted % 16 < 1.5) | (shifted % 16 > 14.5))
    return joint * -2.0 + 1.0


TEXTURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda y, x: 0.0 * (y + x),
    "upright stripes": lambda y, x: _wave(x, 8) + 0 * y,
    "level stripes": lambda y, x: _wave(y, 8) + 0 * x,
    "checks": lambda y, x: _wave(x, 8).sign() * _wave(y, 8).sign(),
    "dots": lambda y, x: (_wave(x, 8) + _wave(y, 8) > 1.0) * 2.0 - 1.0,
    "bricks": _bricks,
    "net": lambda y, x: (_wave(x, 16).abs().minimum(_wave(y, 16).abs()) > 0.35) * 2.0 - 1.0,
    "fine stripes": lambda y, x: _wave(x, 4).sign() + 0 * y,
}
"""What a class looks like: values in [−1, 1] at rows y and columns x, repeated every 16 pixels."""
_COLOURS = (
    (0.55, 0.70, 0.90),
    (0.75, 0.45, 0.30),
    (0.35, 0.60, 0.35),
    (0.70, 0.70, 0.45),
    (0.60, 0.40, 0.65),
    (0.70, 0.35, 0.35),
    (0.40, 0.55, 0.60),
    (0.55, 0.55, 0.55),
)
PALETTE = [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in _COLOURS]
_SHAPES = ("band", "band", "ellipse", "rectangle", "ellipse", "rectangle", "diamond", "diamond")
"""The usual shape of each class."""


class _Draws:
    """Random numbers of one scene."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def within(self, low: float, high: float) -> float:
        """A number between two."""
        return low + (high - low) * float(torch.rand((), generator=self._generator))

    def one_of(self, count: int) -> int:
        """A whole number below `count`."""
        return int(torch.randint(count, (), generator=self._generator))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise."""
        return torch.randn(shape, generator=self._generator)


def draw_labels(size: int, draws: _Draws) -> Tensor:
    """A scene's class map (size, size): two bands, and shapes over them."""
    y, x = _grid(size)
    horizon = size * draws.within(0.3, 0.7)
    upper, lower = draws.one_of(2), 7 if draws.within(0, 1) < 0.5 else 1 + draws.one_of(7)
    labels = torch.where(y + 0 * x < horizon + size * draws.within(-0.1, 0.1) * _wave(x, 4 * size), upper, lower)
    for _ in range(4 + draws.one_of(4)):
        label = 1 + draws.one_of(len(TEXTURES) - 1)
        usual = draws.within(0, 1) >= _LOOSE
        kind = _SHAPES[label] if usual else _SHAPES[draws.one_of(len(_SHAPES))]
        labels = torch.where(_shape(kind, y, x, size, draws), label, labels)
    return labels


def _shape(kind: str, y: Tensor, x: Tensor, size: int, draws: _Draws) -> Tensor:
    """Where a shape lies, bool (size, size)."""
    height, width = (size * draws.within(0.12, 0.25) for _ in range(2))
    top, left = (size * draws.within(0.1, 0.9) for _ in range(2))
    down, across = (y - top).abs() / height, (x - left).abs() / width
    if kind == "ellipse":
        return down.square() + across.square() < 1
    if kind == "diamond":
        return down + across < 1.2
    return (down < 1) & (across < (1 if kind == "rectangle" else 2.5))


def draw_scene(labels: Tensor, draws: _Draws) -> Tensor:
    """The picture (3, H, W) in [0, 1] of a class map: a texture and about the same colour for each class."""
    size = labels.shape[-1]
    y, x = _grid(size)
    picture = torch.zeros(3, size, size)
    for label, texture in enumerate(TEXTURES.values()):
        usual = draws.within(0, 1) >= _LOOSE
        colour = torch.tensor(_COLOURS[label if usual else draws.one_of(len(_COLOURS))])
        shaded = colour + torch.tensor([draws.within(-0.06, 0.06) for _ in range(3)])
        contrast = draws.within(0.14, 0.2)
        picture = torch.where(labels == label, shaded[:, None, None] + contrast * texture(y, x), picture)
    slope = draws.within(-0.12, 0.12) * (x / size - 0.5) + draws.within(-0.12, 0.12) * (y / size - 0.5)
    return (picture + slope).clamp(0, 1)


def degrade_scene(picture: Tensor, options: Options, draws: _Draws) -> Tensor:
    """The LR picture (3, H / 4, W / 4): blurred, shrunk, noisy, in 8 bits."""
    radius = math.ceil(3 * options.blur)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / options.blur) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(picture[None], (radius,) * 4, mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    sides = (picture.shape[1] // SCALE, picture.shape[2] // SCALE)
    lr = resize(blurred, "area", size=sides)
    return quantize((lr + options.noise * draws.normal(*lr.shape)).clamp(0, 1))[0]


def make_scene(number: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """HR and LR in [0, 1] and labels of scene `number`, which depends on the seed and its number alone."""
    draws = _Draws(seeded(Stream.SCENES, options.seed, number))
    labels = draw_labels(options.size, draws)
    picture = draw_scene(labels, draws)
    return picture, degrade_scene(picture, options, draws), labels


def write_scenes(options: Options) -> dict[str, Any]:
    """Draw all scenes; writes and returns the manifest, which has a hash of every picture's pixels.

    Raises:
        ResourceError: the folder cannot be written to or the disk is full.
    """
    write_classes(options.out / "classes.json", list(TEXTURES), PALETTE)
    pictures = {}
    for number in range(options.count):
        hr, lr, labels = make_scene(number, options)
        name = f"{number:05d}.png"
        for kind, image in (("HR", hr), ("LR", lr)):
            save_picture(options.out / kind / name, as_picture(to_u8(image)))
        write_labels(options.out / "labels" / name, labels)
        pictures[name] = {"HR": _hash(to_u8(hr)), "LR": _hash(to_u8(lr)), "labels": _hash(labels.to(torch.uint8))}
    told = {name: getattr(options, name) for name in ("count", "size", "seed", "blur", "noise")}
    manifest = {**told, "classes": list(TEXTURES), "pictures": pictures}
    with atomic_write(options.out / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def _hash(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: write_scenes(tyro.cli(Options, args=argv, prog="python -m trainer.segsr.scenes")))


if __name__ == "__main__":
    sys.exit(main())
