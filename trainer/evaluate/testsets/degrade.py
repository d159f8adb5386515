"""`python -m trainer.evaluate.degrade`: a fixed test set of LR/HR pairs from clean photos, the same for the same seed.

Every photo is degraded by itself, from draws that derive from the seed and its file name, so that a photo's pair does
not depend on which others are in the list. HR is the photo's central square as it is; LR is made from its sharpened
copy, as in training, and both are stored as PNG.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from seesr_core.errors import DataError, SettingsError
from seesr_core.pictures.sizes import to_u8
from seesr_core.pictures.writing import save_picture

from ...data.order import Stream, seeded
from ...data.photos import Photo, load_rgb, read_photos
from ...degradation import DegradationConfig, GeneratorDraws, degrade
from ...engine import command
from ..pictures import as_picture
from ..report.tables import show, write_json

log = logging.getLogger(__name__)

LATENT_MULTIPLE = 32


@dataclass(kw_only=True, slots=True)
class Options:
    """Write OUT/HR and OUT/LR, pictures of one name in both, and OUT/pairs.json."""

    photos: Path
    """Clean photos: a folder, or a .jsonl list."""
    out: Path
    """Folder to write; files of the same names are replaced."""
    seed: int = 0
    """Seed that all draws derive from."""
    hr_size: int = 288
    """Side of the central HR square, a multiple of 32. 288 fits photos of 320 pixels and is three whole blocks of NIQE;
    smaller photos are left out."""
    limit: int = 0
    """Most photos to take, spread over the list; 0 takes all."""
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    """How LR is made; the defaults are those of the published training."""

    def __post_init__(self) -> None:
        if self.hr_size < LATENT_MULTIPLE or self.hr_size % LATENT_MULTIPLE:
            raise SettingsError(f"hr-size must be a positive multiple of {LATENT_MULTIPLE}, not {self.hr_size}.")


def spread(items: Sequence[Any], limit: int) -> list[Any]:
    """Take at most `limit` items, evenly from all over the list; all of them for 0."""
    count = min(limit, len(items)) or len(items)
    return [items[index * len(items) // count] for index in range(count)]


def degraded(hr_3HW: Tensor, name: str, config: DegradationConfig, *, seed: int) -> Tensor:
    """The LR picture, uint8 (3, H // scale, W // scale), of a uint8 photo (3, H, W), drawn from seed and name."""
    draws = GeneratorDraws(seeded(seed, Stream.TEST_DEGRADATION, zlib.crc32(name.encode())))
    return to_u8(degrade(hr_3HW[None].float() / 255.0, config, draws).lr[0])


def central_square(image_3HW: Tensor, side: int) -> Tensor | None:
    """The middle `side`² of a picture (3, H, W); None where it is smaller."""
    top, left = ((length - side) // 2 for length in image_3HW.shape[1:])
    return None if min(top, left) < 0 else image_3HW[:, top : top + side, left : left + side]


def make_pairs(options: Options) -> dict[str, Any]:
    """Write the test set; returns what `pairs.json` holds.

    Raises:
        DataError: no photo is large enough, two photos have one name, or one cannot be read.
    """
    photos = spread(read_photos(options.photos), options.limit)
    check_names(photos)
    done: list[str] = []
    small: list[str] = []
    for photo in photos:
        hr = central_square(load_rgb(photo.path), options.hr_size)
        (small if hr is None else done).append(photo.path.name)
        if hr is not None:
            _write(options, photo.path, hr)
    if not done:
        raise DataError(f"No photo of {options.photos} has {options.hr_size}² pixels; choose a smaller --hr-size.")
    report = {"seed": options.seed, "hr_size": options.hr_size, "degradation": asdict(options.degradation)}
    report |= {"photos": done, "too_small": small}
    write_json(options.out / "pairs.json", report)
    return report


def check_names(photos: Sequence[Photo]) -> None:
    """Refuse a list in which two photos would get the same pair.

    Raises:
        DataError: two have one name without suffix.
    """
    stems = [photo.path.stem for photo in photos]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise DataError(f"Several photos are called {', '.join(twice)}; rename them, since pairs go by name.")


def _write(options: Options, path: Path, hr_3HW: Tensor) -> None:
    with torch.no_grad():
        lr = degraded(hr_3HW, path.name, options.degradation, seed=options.seed)
    save_picture(options.out / "HR" / f"{path.stem}.png", as_picture(hr_3HW))
    save_picture(options.out / "LR" / f"{path.stem}.png", as_picture(lr))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def action() -> None:
        options = tyro.cli(Options, args=argv, prog="python -m trainer.evaluate.degrade")
        report = make_pairs(options)
        show(f"{len(report['photos'])} pairs in {options.out}, {len(report['too_small'])} photos were too small\n")

    return command.run(action)
