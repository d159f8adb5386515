"""`python -m trainer.make_testset`: LR/HR pairs of 128² and 512², the same files for everyone who makes them.

From clean photos, as the paper builds DIV2K-Val: random 512² crops, 30 a photo, degraded as in training. HR is the crop
as it is; LR is made of its sharpened copy, one crop at a time. From real pairs (`--lr`), as its RealSR and DRealSR: the
centre of each, 128² and the 512² that it shows.

Every draw derives from the seed, the photo's name and the crop's number, so a pair does not depend on which others are
made. The manifest holds the hashes of files and of pixels; `--expect` compares with another person's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from seesr_core.errors import DataError, SettingsError
from seesr_core.pictures.writing import save_picture

from ...data.order import Stream, seeded
from ...data.photos import load_rgb, read_photos
from ...degradation import DegradationConfig
from ...engine import command
from ..pictures import as_picture, list_pictures, unmatched
from ..quality.protocols import HR_SIDE, LR_SIDE, SCALE, centre
from ..quality.state import file_hash
from ..report.tables import show, write_json
from .degrade import check_names, degraded

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(kw_only=True, slots=True)
class Options:
    """Write OUT/HR, OUT/LR (pictures of one name in both) and OUT/manifest.json."""

    hr: Path
    """Clean photos or originals: a folder, or a .jsonl list."""
    out: Path
    """Folder to write; files of the same names are replaced."""
    lr: Path | None = None
    """Real photos of a quarter of the size, matched by name: centre crops of both, no degradation."""
    crops: int = 30
    """Random crops of each photo; 30 of each of DIV2K's 100 validation photos make the paper's 3,000."""
    seed: int = 0
    """Seed that all draws derive from."""
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    """How LR is made; the defaults are those of the published training."""
    expect: Path | None = None
    """Another manifest: tell whether the pixels are the same."""

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise SettingsError(f"--crops must be at least 1, not {self.crops}.")
        if self.degradation.scale != SCALE:
            raise SettingsError(f"A test set is made at scale {SCALE}, not {self.degradation.scale}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One pair to write."""

    name: str
    """Name of the picture without suffix."""
    source: Path
    """The photo that HR comes from."""
    corner: tuple[int, int]
    """Left and top of HR in the photo, in pixels."""
    hr: Tensor
    """HR, uint8 (3, 512, 512)."""
    lr: Tensor
    """LR, uint8 (3, 128, 128)."""


def make_testset(options: Options) -> dict[str, Any]:
    """Write the set; returns the manifest.

    Raises:
        DataError: nothing is large enough, names are not unique or do not match, or a photo cannot be read.
    """
    small: list[str] = []
    entries, sources = {}, {}
    for pair in _real_pairs(options, small) if options.lr else _degraded_pairs(options, small):
        entries[pair.name] = _write(options.out, pair)
        sources[pair.source.name] = file_hash(pair.source)
    if not entries:
        raise DataError(f"No photo of {options.hr} has {HR_SIDE}² pixels; give larger ones.")
    manifest = {
        "kind": "real pairs, centre crops" if options.lr else "random crops, degraded",
        "sizes": {"HR": HR_SIDE, "LR": LR_SIDE},
        **({} if options.lr else {"seed": options.seed, "degradation": asdict(options.degradation)}),
        "made_with": {name: version(name) for name in ("torch", "pillow")},
        "sources": sources,
        "too_small": small,
        "pictures": entries,
    }
    write_json(options.out / MANIFEST, manifest)
    return manifest


def _degraded_pairs(options: Options, small: list[str]) -> Iterator[Pair]:
    photos = read_photos(options.hr)
    check_names(photos)
    for photo in photos:
        image = load_rgb(photo.path)
        if min(image.shape[1:]) < HR_SIDE:
            small.append(photo.path.name)
            continue
        for number in range(options.crops):
            name = f"{photo.path.stem}_{number:03d}"
            left, top = _corner(image, options.seed, name)
            hr = image[:, top : top + HR_SIDE, left : left + HR_SIDE]
            with torch.no_grad():
                lr = degraded(hr, name, options.degradation, seed=options.seed)
            yield Pair(name=name, source=photo.path, corner=(left, top), hr=hr, lr=lr)


def _corner(image_3HW: Tensor, seed: int, name: str) -> tuple[int, int]:
    """Left and top of a random 512² crop, drawn from seed and name."""
    generator = seeded(seed, Stream.TEST_CROP, zlib.crc32(name.encode()))
    top, left = (int(torch.randint(side - HR_SIDE + 1, (), generator=generator)) for side in image_3HW.shape[1:])
    return left, top


def _real_pairs(options: Options, small: list[str]) -> Iterator[Pair]:
    if options.lr is None:
        raise ValueError("real pairs need --lr")
    folders = {"hr": list_pictures(options.hr), "lr": list_pictures(options.lr)}
    for kind, names in unmatched(folders).items():
        raise DataError(f"--{kind} has {', '.join(names[:5])}, the other folder has not; complete or remove them.")
    for name, path in folders["hr"].items():
        hr, lr = load_rgb(path), load_rgb(folders["lr"][name])
        if tuple(hr.shape[1:]) != tuple(side * SCALE for side in lr.shape[1:]):
            sizes = " and ".join(f"{image.shape[2]}×{image.shape[1]}" for image in (hr, lr))
            raise DataError(f"{name}: HR should be {SCALE} times as large as LR, they have {sizes} pixels.")
        hr_part, lr_part = centre(hr, HR_SIDE, SCALE), centre(lr, LR_SIDE)
        if hr_part is None or lr_part is None:
            small.append(path.name)
            continue
        top, left = ((side // SCALE - LR_SIDE) // 2 * SCALE for side in hr.shape[1:])
        yield Pair(name=name, source=path, corner=(left, top), hr=hr_part, lr=lr_part)


def _write(out: Path, pair: Pair) -> dict[str, Any]:
    entry: dict[str, Any] = {"source": pair.source.name, "left": pair.corner[0], "top": pair.corner[1]}
    for kind, image in (("HR", pair.hr), ("LR", pair.lr)):
        path = out / kind / f"{pair.name}.png"
        save_picture(path, as_picture(image))
        pixels = hashlib.sha256(image.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()
        entry[kind] = {"file_sha256": file_hash(path), "pixels_sha256": pixels}
    return entry


def compare(manifest: Mapping[str, Any], path: Path) -> str:
    """One sentence on how the pixels of a set relate to those of another manifest.

    Raises:
        DataError: `path` is no manifest, or the sets differ.
    """
    try:
        other = {name: _pixels(entry) for name, entry in json.loads(path.read_text("utf-8"))["pictures"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} should be the {MANIFEST} of a test set ({error!r}).") from error
    own = {name: _pixels(entry) for name, entry in manifest["pictures"].items()}
    if own == other:
        return f"All {len(own)} pairs have the pixels of {path}."
    lonely = sorted(own.keys() ^ other.keys())
    differ = sorted(name for name in own.keys() & other.keys() if own[name] != other[name])
    raise DataError(
        f"This is not the set of {path}: {len(differ)} pairs have other pixels ({', '.join(differ[:3]) or 'none'}), "
        f"{len(lonely)} are only in one ({', '.join(lonely[:3]) or 'none'}); compare the sources, seed and versions."
    )


def _pixels(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["HR"]["pixels_sha256"], entry["LR"]["pixels_sha256"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def action() -> None:
        options = tyro.cli(Options, args=argv, prog="python -m trainer.make_testset")
        manifest = make_testset(options)
        show(
            f"{len(manifest['pictures'])} pairs in {options.out}, {len(manifest['too_small'])} photos were too small\n"
        )
        if options.expect is not None:
            show(compare(manifest, options.expect) + "\n")

    return command.run(action)
