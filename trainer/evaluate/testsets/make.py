"""`python -m trainer.evaluate testset`: LR/HR pairs, the same files for everyone who makes them.

Three ways. Random 512² crops of clean photos, 30 a photo, degraded as in training: as the paper builds DIV2K-Val. The
central square of each photo (`--crops 0`), degraded in the same way: for photos that are small or already squares
(`python -m trainer.evaluate degrade` has these defaults). The centres of real pairs (`--lr`), 128² and the 512² that it
shows: as the paper's RealSR and DRealSR. HR is the photo as it is; LR is made of its sharpened copy, one at a time.

Every draw derives from the seed, the photo's name and the crop's number, so a pair does not depend on which others are
made. The manifest holds the hashes of files and of pixels; `--expect` compares with another person's.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from seesr_core.errors import DataError, SettingsError
from seesr_core.formats.schema import read_json
from seesr_core.install.hashing import sha256
from seesr_core.pictures.sizes import from_u8, to_u8
from seesr_core.pictures.writing import save_picture

from ...data.order import Stream, seeded
from ...data.photos import Photo, load_rgb, read_photos
from ...degradation import DegradationConfig, GeneratorDraws, degrade
from ..pictures import as_picture, list_pictures, spread, unmatched
from ..quality.protocols import HR_SIDE, SCALE, centre
from ..report.tables import show, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SQUARES = "pairs.json"
"""What `degrade` writes beside the manifest: how LR was made, and which photos were taken."""
LATENT_MULTIPLE = 32


@dataclass(kw_only=True, slots=True)
class Options:
    """Write OUT/HR, OUT/LR (pictures of one name in both) and OUT/manifest.json."""

    hr: Annotated[Path, tyro.conf.arg(aliases=["--photos"])]
    """Clean photos or originals: a folder, or a .jsonl list."""
    out: Path
    """Folder to write; files of the same names are replaced."""
    lr: Path | None = None
    """Real photos of a quarter of the size, matched by name: centre crops of both, no degradation."""
    hr_size: int = HR_SIDE
    """Side of HR, a multiple of 32. Smaller photos are left out."""
    crops: int = 30
    """Random crops of each photo; 30 of each of DIV2K's 100 validation photos make the paper's 3,000. 0 takes the
    central square instead."""
    limit: int = 0
    """Most photos to take, spread over all; 0 takes all."""
    seed: int = 0
    """Seed that all draws derive from."""
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    """How LR is made; the defaults are those of the published training."""
    expect: Path | None = None
    """Another manifest: tell whether the pixels are the same."""

    def __post_init__(self) -> None:
        if self.crops < 0:
            raise SettingsError(f"--crops must be at least 1, or 0 for the central square, not {self.crops}.")
        if self.hr_size < LATENT_MULTIPLE or self.hr_size % LATENT_MULTIPLE:
            raise SettingsError(f"--hr-size must be a positive multiple of {LATENT_MULTIPLE}, not {self.hr_size}.")
        if self.degradation.scale != SCALE:
            raise SettingsError(f"A test set is made at scale {SCALE}, not {self.degradation.scale}.")


@dataclass(kw_only=True, slots=True)
class SquareOptions(Options):
    """Write OUT/HR, OUT/LR (pictures of one name in both), OUT/manifest.json and OUT/pairs.json.

    By default one square a photo.
    """

    hr_size: int = 288
    """Side of HR, a multiple of 32. 288 fits photos of 320 pixels and is three whole blocks of NIQE; smaller photos are
    left out."""
    crops: int = 0
    """Random crops of each photo; 0 takes the central square."""


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
    """HR, uint8 (3, S, S)."""
    lr: Tensor
    """LR, uint8 (3, S / 4, S / 4)."""


def make_testset(options: Options) -> dict[str, Any]:
    """Write the set; returns the manifest.

    Raises:
        DataError: nothing is large enough, names are not unique or do not match, or a photo cannot be read.
    """
    small: list[str] = []
    entries, sources = {}, {}
    for pair in _real_pairs(options, small) if options.lr else _degraded_pairs(options, small):
        entries[pair.name] = _write(options.out, pair)
        sources[pair.source.name] = sha256(pair.source)
    if not entries:
        raise DataError(
            f"No photo of {options.hr} has {options.hr_size}² pixels; give larger ones or a smaller --hr-size."
        )
    manifest = {
        "kind": _kind(options),
        "sizes": {"HR": options.hr_size, "LR": options.hr_size // SCALE},
        **({} if options.lr else {"seed": options.seed, "degradation": asdict(options.degradation)}),
        "made_with": {name: version(name) for name in ("torch", "pillow")},
        "sources": sources,
        "too_small": small,
        "pictures": entries,
    }
    write_json(options.out / MANIFEST, manifest)
    if isinstance(options, SquareOptions) and not options.lr:
        write_json(options.out / SQUARES, _squares(options, manifest))
    return manifest


def _squares(options: SquareOptions, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "hr_size": options.hr_size,
        "degradation": asdict(options.degradation),
        "photos": list(manifest["sources"]),
        "too_small": manifest["too_small"],
    }


def _kind(options: Options) -> str:
    if options.lr:
        return "real pairs, centre crops"
    return "random crops, degraded" if options.crops else "central squares, degraded"


def _degraded_pairs(options: Options, small: list[str]) -> Iterator[Pair]:
    photos = spread(read_photos(options.hr), options.limit)
    check_names(photos)
    side = options.hr_size
    for photo in photos:
        image = load_rgb(photo.path)
        if min(image.shape[1:]) < side:
            small.append(photo.path.name)
            continue
        for name, seeding, (left, top) in _places(photo.path, image, options):
            hr = image[:, top : top + side, left : left + side]
            with torch.no_grad():
                lr = degraded(hr, seeding, options.degradation, seed=options.seed)
            yield Pair(name=name, source=photo.path, corner=(left, top), hr=hr, lr=lr)


def _places(path: Path, image_3HW: Tensor, options: Options) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Name, what the draws of its degradation derive from, and left and top of every square of a photo."""
    if not options.crops:
        height, width = image_3HW.shape[1:]
        yield path.stem, path.name, ((width - options.hr_size) // 2, (height - options.hr_size) // 2)
    for number in range(options.crops):
        name = f"{path.stem}_{number:03d}"
        yield name, name, _corner(image_3HW, name, options)


def _corner(image_3HW: Tensor, name: str, options: Options) -> tuple[int, int]:
    """Left and top of a random crop, drawn from seed and name."""
    generator = seeded(options.seed, Stream.TEST_CROP, zlib.crc32(name.encode()))
    spare = (side - options.hr_size + 1 for side in image_3HW.shape[1:])
    top, left = (int(torch.randint(places, (), generator=generator)) for places in spare)
    return left, top


def degraded(hr_3HW: Tensor, name: str, config: DegradationConfig, *, seed: int) -> Tensor:
    """The LR picture, uint8 (3, H // scale, W // scale), of a uint8 photo (3, H, W), drawn from seed and name."""
    draws = GeneratorDraws(seeded(seed, Stream.TEST_DEGRADATION, zlib.crc32(name.encode())))
    return to_u8(degrade(from_u8(hr_3HW[None]), config, draws).lr[0])


def check_names(photos: Sequence[Photo]) -> None:
    """Refuse a list in which two photos would get the same pair.

    Raises:
        DataError: two have one name without suffix.
    """
    stems = [photo.path.stem for photo in photos]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise DataError(f"Several photos are called {', '.join(twice)}; rename them, since pairs go by name.")


def _real_pairs(options: Options, small: list[str]) -> Iterator[Pair]:
    if options.lr is None:
        raise ValueError("real pairs need --lr")
    folders = {"hr": list_pictures(options.hr), "lr": list_pictures(options.lr)}
    for kind, names in unmatched(folders).items():
        raise DataError(f"--{kind} has {', '.join(names[:5])}, the other folder has not; complete or remove them.")
    for name in spread(list(folders["hr"]), options.limit):
        path = folders["hr"][name]
        hr, lr = load_rgb(path), load_rgb(folders["lr"][name])
        if tuple(hr.shape[1:]) != tuple(side * SCALE for side in lr.shape[1:]):
            sizes = " and ".join(f"{image.shape[2]}×{image.shape[1]}" for image in (hr, lr))
            raise DataError(f"{name}: HR should be {SCALE} times as large as LR, they have {sizes} pixels.")
        lr_side = options.hr_size // SCALE
        hr_part, lr_part = centre(hr, options.hr_size, SCALE), centre(lr, lr_side)
        if hr_part is None or lr_part is None:
            small.append(path.name)
            continue
        top, left = ((side // SCALE - lr_side) // 2 * SCALE for side in hr.shape[1:])
        yield Pair(name=name, source=path, corner=(left, top), hr=hr_part, lr=lr_part)


def _write(out: Path, pair: Pair) -> dict[str, Any]:
    entry: dict[str, Any] = {"source": pair.source.name, "left": pair.corner[0], "top": pair.corner[1]}
    for kind, image in (("HR", pair.hr), ("LR", pair.lr)):
        path = out / kind / f"{pair.name}.png"
        save_picture(path, as_picture(image))
        pixels = hashlib.sha256(image.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()
        entry[kind] = {"file_sha256": sha256(path), "pixels_sha256": pixels}
    return entry


def compare(manifest: Mapping[str, Any], path: Path) -> str:
    """One sentence on how the pixels of a set relate to those of another manifest.

    Raises:
        DataError: `path` is no manifest, or the sets differ.
    """
    try:
        other = {name: _pixels(entry) for name, entry in read_json(path)["pictures"].items()}
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


def command(options: Options) -> None:
    """Make the set and say how many pairs it has."""
    manifest = make_testset(options)
    show(f"{len(manifest['pictures'])} pairs in {options.out}, {len(manifest['too_small'])} photos were too small\n")
    if options.expect is not None:
        show(compare(manifest, options.expect) + "\n")
