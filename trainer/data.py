"""Photos with tags, and the crops that training draws from them.

Which photo is drawn and how it is cropped depends on (seed, image number) alone, so an interrupted run continues with
the very images that an uninterrupted one would have seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

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
        DataError: nothing is there, a line is not as described, or no photo was found.
    """
    if source.is_dir():
        photos = [Photo(path) for path in sorted(source.rglob("*")) if path.suffix.lower() in SUFFIXES]
    elif source.is_file():
        photos = [_read_line(source, number, line) for number, line in enumerate(_lines(source), 1)]
    else:
        raise DataError(f"{source} does not exist; expected a folder of photos or a .jsonl list with one photo a line.")
    if not photos:
        raise DataError(f"No photos in {source}; expected at least one of {', '.join(sorted(SUFFIXES))}.")
    return photos


def _lines(source: Path) -> list[str]:
    try:
        return source.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} is no list of photos: expected a folder or UTF-8 text, found {error}.") from error


def _read_line(source: Path, number: int, line: str) -> Photo:
    try:
        entry = json.loads(line)
        path, tags = source.parent / entry["file"], entry.get("tags") or []
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise TypeError("tags are a list of words")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source}:{number} should be a JSON object with the key 'file' and maybe a list 'tags', "
            f"this is {line[:60]!r}."
        ) from error
    if not path.is_file():
        raise DataError(
            f"{source}:{number} names {entry['file']}, but {path} does not exist; put it there or drop the line."
        )
    return Photo(path, tuple(tags))


def load_rgb(path: Path) -> Tensor:
    """A photo as uint8 (3, H, W), EXIF rotation applied.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(path) as image:
        array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def _check_header(path: Path) -> None:
    with _opened(path):
        pass


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); remove it from the training data.") from error


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a tuple of numbers such as (seed, stream, step); different tuples give unrelated streams."""
    # SeedSequence ignores zeros at the end, so the count goes in front.
    entropy = [len(numbers), *(number & 0xFFFFFFFF for number in numbers)]
    state = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def by_image(*numbers: int, images: Iterable[int]) -> list[torch.Generator]:
    """A generator for each image, which depends on `numbers` and on the number of the image."""
    return [seeded(*numbers, image) for image in images]


def epoch_order(number: int, count: int, seed: int) -> int:
    """Which of `count` items is drawn as number `number`: each once an epoch, every epoch in an order of its own."""
    epoch, position = divmod(number, count)
    return int(torch.randperm(count, generator=seeded(seed, 1, epoch))[position])


@contextlib.contextmanager
def scoped_seed(*numbers: int) -> Iterator[None]:
    """Within the block torch's own generators (dropout, initialisation) derive from `numbers`; then they are as
    before."""
    with torch.random.fork_rng():
        torch.manual_seed(seeded(*numbers).initial_seed())
        yield


class Crops:
    """Random square crops of photos.

    Args:
        photos: what to crop from; photos that cannot be read are skipped and logged.
        size: side of a crop in pixels.
        min_scale: photos are shrunk by a random factor between this and 1 before cropping (and never below `size`).
        seed: what the order and the crops derive from.
        memory: how many bytes of decoded photos are kept, the first ones of the list; the others are read again
            whenever they are drawn.

    Raises:
        DataError: more than a tenth of the photos cannot be read.
    """

    def __init__(
        self, photos: Sequence[Photo], *, size: int, min_scale: float = 1.0, seed: int = 0, memory: int = 4 << 30
    ) -> None:
        self.size, self.min_scale, self.seed = size, min_scale, seed
        self.photos: list[Photo] = []
        self._kept: list[Tensor] = []
        self._room = memory
        for photo in photos:
            self._add(photo)
        if len(self) < 0.9 * len(photos):
            raise DataError(f"Only {len(self)} of {len(photos)} photos can be used; the log above names the others.")

    def _add(self, photo: Photo) -> None:
        try:
            if self._room > 0:
                self._keep(load_rgb(photo.path))
            else:
                _check_header(photo.path)
        except DataError as error:
            log.warning("skipped: %s", error)
            return
        self.photos.append(photo)

    def _keep(self, image: Tensor) -> None:
        self._kept.append(image)
        self._room -= image.numel()

    def __len__(self) -> int:
        return len(self.photos)

    def image(self, index: int) -> Tensor:
        """Photo `index` whole, uint8 (3, H, W)."""
        return self._kept[index] if index < len(self._kept) else load_rgb(self.photos[index].path)

    def index(self, number: int) -> int:
        """Which photo is drawn as image `number`: every photo once an epoch, each epoch in an order of its own."""
        return epoch_order(number, len(self), self.seed)

    def crop(self, index: int, generator: torch.Generator) -> Tensor:
        """A random crop of photo `index`, uint8 (3, size, size), flipped with probability ½."""
        image = self.image(index)
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
        """The crops of part `step` of the training: uint8 (count, 3, size, size) and the photo each came from."""
        numbers = range(step * count, (step + 1) * count)
        indices = [self.index(number) for number in numbers]
        crops = [self.crop(index, seeded(self.seed, 2, number)) for index, number in zip(indices, numbers, strict=True)]
        return torch.stack(crops), indices


def fingerprint(module: nn.Module) -> str:
    """A short text that differs when any weight does."""
    state = module.state_dict()
    return digest(state[name].detach().float().cpu().numpy().tobytes() for name in sorted(state))


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
