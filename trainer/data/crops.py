"""Photos with tags, and the crops that training draws from them.

Which photo is drawn and how it is cropped depends on (seed, image number) alone, so an interrupted run continues with
the very images that an uninterrupted one would have seen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from seesr_core.errors import DataError
from seesr_core.runtime.files import atomic_write

from .ahead import Ahead
from .mixture import WeightedOrder
from .order import Stream, epoch_order, seeded
from .photos import Photo, load_photo, load_rgb, opened

log = logging.getLogger(__name__)

PAIR_SCALE = 4
"""HR side over LR side of pairs that are given."""
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "F"}
_GREY_TOLERANCE = 6
"""Levels by which the channels of a grey JPEG may differ."""


class Crops:
    """Random square crops of photos.

    Args:
        photos: what to crop from; photos that cannot be used are skipped, logged and kept in `skipped`.
        size: side of a crop in pixels.
        min_scale: photos are shrunk by a random factor between this and 1 before cropping (and never below `size`).
        seed: what the order and the crops derive from.
        memory: how many bytes of decoded photos are kept, the first ones of the list; the others are read again
            whenever they are drawn.
        smallest: photos with a shorter side than this are skipped; smaller ones than `size` are enlarged.
        skip_grey: whether photos without colour are skipped, too.
        workers: threads that prepare the next batches; what a batch is does not depend on them.
        stride: how far the numbers of the batches that this process asks for lie apart.
        fixed: whether a photo is cropped and flipped alike whenever it is drawn.

    Raises:
        DataError: more than a tenth of the photos cannot be used, or some are pairs and others not.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        *,
        size: int,
        min_scale: float = 1.0,
        seed: int = 0,
        memory: int = 4 << 30,
        smallest: int = 0,
        skip_grey: bool = False,
        workers: int = 0,
        stride: int = 1,
        fixed: bool = False,
    ) -> None:
        self.fixed, self.varying = fixed, 0
        self.size, self.min_scale, self.seed = size, min_scale, seed
        self.smallest, self.skip_grey = smallest, skip_grey
        self.photos: list[Photo] = []
        self.skipped: list[str] = []
        self._kept: list[Tensor] = []
        self._room = memory
        for photo in photos:
            self._add(photo)
        few = "; ".join(self.skipped[:3]) + (" …" if len(self.skipped) > 3 else "")
        if len(self) < 0.9 * len(photos):
            raise DataError(f"Only {len(self)} of {len(photos)} photos can be used ({few}).")
        if self.skipped:
            log.warning("skipped %d of %d photos (%s)", len(self.skipped), len(photos), few)
        self.paired = any(photo.lr for photo in self.photos)
        if self.paired and not all(photo.lr for photo in self.photos):
            raise DataError(
                "Some photos have a degraded partner (LR) and others have not; train on one kind at a time."
            )
        self._order = self._weighted()
        self._ahead = Ahead(self._make, workers, stride)

    def _add(self, photo: Photo) -> None:
        try:
            if self._room > 0:
                image = load_photo(photo)
                self._check(photo, (image.shape[2], image.shape[1]), grey=self.skip_grey and _is_grey(image))
                self._keep(image)
            else:
                with opened(photo) as header:
                    self._check(photo, header.size, grey=self.skip_grey and header.mode in _GREY_MODES)
        except DataError as error:
            self.skipped.append(str(error))
            return
        self.photos.append(photo)

    def _check(self, photo: Photo, sides: tuple[int, int], *, grey: bool) -> None:
        least = max(self.smallest, self.size if photo.lr else 1)
        if min(sides) < least:
            raise DataError(f"{photo.path} has {sides[0]}×{sides[1]} pixels, smaller than {least}.")
        if grey:
            raise DataError(f"{photo.path} has no colour.")
        if photo.lr:
            with opened(Photo(photo.lr)) as lr:
                if tuple(side * PAIR_SCALE for side in lr.size) != sides:
                    raise DataError(
                        f"{photo.path} has {sides[0]}×{sides[1]} pixels, expected {PAIR_SCALE} times those of "
                        f"{photo.lr} ({lr.size[0]}×{lr.size[1]})."
                    )
        whole = sides[0] == sides[1] <= self.size and (self.min_scale == 1 or photo.lr is not None)
        self.varying += not (whole or self.fixed)

    def _keep(self, image: Tensor) -> None:
        self._kept.append(image)
        self._room -= image.numel()

    def _weighted(self) -> WeightedOrder | None:
        """The order of a mixture, if the photos are from one."""
        sources = list(dict.fromkeys(photo.source for photo in self.photos if photo.source))
        if not sources:
            return None
        groups = [[i for i, photo in enumerate(self.photos) if photo.source == source] for source in sources]
        return WeightedOrder(groups, [source.weight for source in sources], self.seed)

    def __len__(self) -> int:
        return len(self.photos)

    def image(self, index: int) -> Tensor:
        """Photo `index` whole, uint8 (3, H, W)."""
        return self._kept[index] if index < len(self._kept) else load_photo(self.photos[index])

    def index(self, number: int) -> int:
        """Which photo is drawn as image `number`: every photo once an epoch, each epoch in an order of its own."""
        return self._order(number) if self._order else epoch_order(number, len(self), self.seed)

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
        return self._ahead.get(step, count)

    def _make(self, step: int, count: int) -> tuple[Tensor, list[int]]:
        numbers = range(step * count, (step + 1) * count)
        indices = [self.index(number) for number in numbers]
        crops = [self.crop(index, self._draws(index, number)) for index, number in zip(indices, numbers, strict=True)]
        return torch.stack(crops), indices

    def _draws(self, index: int, number: int) -> torch.Generator:
        """What decides on the crop of photo `index`, drawn as image `number`."""
        return seeded(self.seed, Stream.FIXED_CROP, index) if self.fixed else seeded(self.seed, Stream.CROP, number)

    def pairs(self, step: int, count: int) -> tuple[Tensor, Tensor, list[int]]:
        """As `batch`, of photos with a degraded partner: HR, LR (count, 3, size / 4, size / 4) and the photos."""
        numbers = range(step * count, (step + 1) * count)
        indices = [self.index(number) for number in numbers]
        crops = [self._pair(i, self._draws(i, number)) for i, number in zip(indices, numbers, strict=True)]
        hr, lr = (torch.stack(images) for images in zip(*crops, strict=True))
        return hr, lr, indices

    def _pair(self, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same random window of HR and LR, both flipped with probability ½."""
        hr, lr = self.image(index), load_rgb(cast(Path, self.photos[index].lr))
        region = self.size // PAIR_SCALE
        top, left = (_randint(side - region + 1, generator) for side in lr.shape[1:])
        flipped = bool(_randint(2, generator))
        crops = (_window(image, top * s, left * s, region * s) for image, s in ((hr, PAIR_SCALE), (lr, 1)))
        hr, lr = (crop.flip(2) if flipped else crop for crop in crops)
        return hr, lr


def _window(image: Tensor, top: int, left: int, side: int) -> Tensor:
    return image[:, top : top + side, left : left + side]


def _is_grey(image: Tensor) -> bool:
    """Whether the channels are the same but for what compression does to them."""
    thumbnail = image[:, ::4, ::4].to(torch.int16)
    return int((thumbnail - thumbnail.roll(1, 0)).abs().max()) <= _GREY_TOLERANCE


def _randint(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))


def write_skipped(crops: Crops, folder: Path) -> None:
    """List the photos that cannot be used in `folder/skipped.txt`, one sentence a line."""
    if crops.skipped:
        log.warning("%d photos were skipped; %s lists them", len(crops.skipped), folder / "skipped.txt")
        with atomic_write(folder / "skipped.txt") as temporary:
            temporary.write_text("".join(f"{line}\n" for line in crops.skipped), "utf-8")
