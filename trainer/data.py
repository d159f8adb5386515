"""Photos with tags, and the crops that training draws from them.

Which photo is drawn and how it is cropped depends on (seed, image number) alone, so an interrupted run continues with
the very images that an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from seesr_core.errors import DataError

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, slots=True)
class Photo:
    """One training photo."""

    path: Path
    """Where it lies."""
    tags: tuple[str, ...] = ()
    """What is known to be on it; a missing tag means unknown, not absent."""


def read_photos(source: Path) -> list[Photo]:
    """The photos of a folder (recursive, sorted), or of a JSON-lines list.

    A line of the list has `file`, relative to the list, and optionally `tags`.

    Raises:
        DataError: nothing is there, a line is no JSON object with `file`, or no photo was found.
    """
    if source.is_dir():
        photos = [Photo(path) for path in sorted(source.rglob("*")) if path.suffix.lower() in SUFFIXES]
    elif source.is_file():
        photos = [
            _read_line(source, number, line) for number, line in enumerate(source.read_text("utf-8").splitlines(), 1)
        ]
    else:
        raise DataError(f"{source} does not exist; expected a folder of photos or a .jsonl list with one photo a line.")
    if not photos:
        raise DataError(f"No photos in {source}; expected at least one of {', '.join(sorted(SUFFIXES))}.")
    return photos


def _read_line(source: Path, number: int, line: str) -> Photo:
    try:
        entry = json.loads(line)
        path = source.parent / entry["file"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source}:{number} should be a JSON object with the key 'file', this is {line[:60]!r}."
        ) from error
    if not path.is_file():
        raise DataError(
            f"{source}:{number} names {entry['file']}, but {path} does not exist; put it there or drop the line."
        )
    return Photo(path, tuple(entry.get("tags") or ()))


def load_rgb(path: Path) -> Tensor:
    """A photo as uint8 (3, H, W), EXIF rotation applied."""
    try:
        with Image.open(path) as image:
            array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); remove it from the training data.") from error
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a tuple of numbers such as (seed, stream, step); different tuples give unrelated streams."""
    # SeedSequence ignores zeros at the end, so the count goes in front.
    entropy = [len(numbers), *(number & 0xFFFFFFFF for number in numbers)]
    state = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


class Crops:
    """Random square crops of photos, held in memory as uint8.

    Args:
        photos: what to crop from; photos that cannot be read are skipped and logged.
        size: side of a crop in pixels.
        min_scale: photos are shrunk by a random factor between this and 1 before cropping (and never below `size`).
        seed: what the order and the crops derive from.
    """

    def __init__(self, photos: Sequence[Photo], *, size: int, min_scale: float = 1.0, seed: int = 0) -> None:
        self.size, self.min_scale, self.seed = size, min_scale, seed
        self.photos: list[Photo] = []
        self.images: list[Tensor] = []
        for photo in photos:
            self._add(photo)
        if len(self.images) < 0.9 * len(photos):
            raise DataError(
                f"Only {len(self.images)} of {len(photos)} photos can be used; the log above names the others."
            )

    def _add(self, photo: Photo) -> None:
        try:
            image = load_rgb(photo.path)
        except DataError as error:
            log.warning("skipped: %s", error)
            return
        self.photos.append(photo)
        self.images.append(image)

    def __len__(self) -> int:
        return len(self.images)

    def index(self, number: int) -> int:
        """Which photo is drawn as image `number`: every photo once an epoch, each epoch in an order of its own."""
        epoch, position = divmod(number, len(self))
        return int(torch.randperm(len(self), generator=seeded(self.seed, 1, epoch))[position])

    def crop(self, index: int, generator: torch.Generator) -> Tensor:
        """A random crop of photo `index`, uint8 (3, size, size), flipped with probability ½."""
        image = self.images[index]
        scale = self.min_scale + (1 - self.min_scale) * float(torch.rand((), generator=generator))
        region = min(round(self.size / max(scale, 1e-3)), *image.shape[1:])
        top, left = (_randint(side - region + 1, generator) for side in image.shape[1:])
        patch = self._resized(image[:, top : top + region, left : left + region])
        return patch.flip(2) if _randint(2, generator) else patch

    def _resized(self, patch: Tensor) -> Tensor:
        if patch.shape[1] == self.size:
            return patch
        sides = (self.size, self.size)
        resized = torch.nn.functional.interpolate(patch[None].float(), sides, mode="bicubic", antialias=True)
        return resized[0].round_().clamp_(0, 255).to(torch.uint8)

    def batch(self, step: int, count: int) -> tuple[Tensor, list[int]]:
        """The crops of one training step: uint8 (count, 3, size, size) and the photo each came from."""
        numbers = range(step * count, (step + 1) * count)
        indices = [self.index(number) for number in numbers]
        crops = [self.crop(index, seeded(self.seed, 2, number)) for index, number in zip(indices, numbers, strict=True)]
        return torch.stack(crops), indices


def digest(parts: Iterable[bytes]) -> str:
    """A short text that differs when any part does."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]


def same_photos(photos: Sequence[Photo]) -> str:
    """A short text for a run's settings: two lists of photos have the same if their names and tags are equal."""
    names = ("\0".join((photo.path.name, *photo.tags)).encode() for photo in photos)
    return f"{len(photos)} ({digest(names)})"


def _randint(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))
