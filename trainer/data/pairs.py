"""Training pairs: crops of photos in, degraded and clean images out; what an image becomes depends on its number."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from seesr_core.errors import SettingsError
from seesr_core.pictures.sizes import from_u8

from ..degradation import DegradationConfig, GeneratorDraws, Pair, degrade
from ..degradation.ops import quantize, resize
from ..engine.loop_config import LoopConfig
from ..engine.processes import is_main_process, process_count
from .crops import Crops
from .order import seeded
from .photos import Photo
from .stage_config import StageConfig

log = logging.getLogger(__name__)


def make_pairs(
    hr_B3HW: Tensor,
    config: DegradationConfig,
    *,
    numbers: tuple[int, ...],
    first: int = 0,
    group: int,
    device: torch.device,
) -> Pair:
    """Degrade crops on `device`, in float32 also within autocast.

    Args:
        hr_B3HW: crops, uint8.
        config: of the degradation.
        numbers: what all draws derive from beside the number of the image, such as (seed, stream).
        first: number of the first image; the others follow.
        group: crops that share the decisions which the degradation makes once a batch (resizes, kinds of noise, order).
            At 1 every image decides alone, as in the published training, where the set was degraded beforehand.
            Groups begin at multiples of their size, so a batch may be divided between them only.
        device: where to compute.

    Returns:
        RGB in [0, 1]; `lr_upsampled` is clamped.
    """
    hr = from_u8(hr_B3HW.to(device))
    with torch.autocast(device.type, enabled=False):
        parts = [
            degrade(part, config, GeneratorDraws(seeded(*numbers, first + index * group)))
            for index, part in enumerate(hr.split(group))
        ]
    lr, hr_usm, lr_upsampled = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("lr", "hr_usm", "lr_upsampled")
    )
    return Pair(lr=lr, hr_usm=hr_usm, lr_upsampled=lr_upsampled.clamp(0, 1))


def given_pairs(crops: Crops, step: int, count: int, *, device: torch.device) -> tuple[Pair, list[int]]:
    """Crops of photos that come with their degraded partners, and which photos they are; HR is not sharpened."""
    hr, lr, photos = crops.pairs(step, count)
    hr, lr = (from_u8(image.to(device)) for image in (hr, lr))
    upsampled = resize(lr, "bicubic", size=hr.shape[-2:])
    return Pair(lr=lr, hr_usm=hr, lr_upsampled=quantize(upsampled.clamp(0, 1))), photos


def say_what_lr_is(photos: Sequence[Photo]) -> None:
    """Log one sentence on where the degraded pictures of a run come from: its first line."""
    if is_main_process():
        log.info("%s", what_lr_is(photos))


def what_lr_is(photos: Sequence[Photo]) -> str:
    """One sentence on where the degraded pictures of a run come from."""
    given = sum(photo.lr is not None for photo in photos)
    if given == len(photos):
        return f"LR: given with all {given} photos, and not degraded."
    if given:
        return f"LR: given with {given} of {len(photos)} photos only."
    return f"LR: made of {len(photos)} photos by the recipe's degradation."


def make_crops(
    photos: Sequence[Photo],
    config: StageConfig,
    *,
    workers: int | None = None,
    memory: int = 4 << 30,
) -> Crops:
    """The crops of a stage as its recipe wants them."""
    return Crops(
        photos,
        size=config.crop,
        min_scale=config.min_scale,
        seed=config.loop.seed,
        memory=memory,
        smallest=config.smallest_photo,
        skip_grey=config.skip_grey,
        workers=config.loop.workers if workers is None else workers,
        stride=process_count(),
        fixed=config.fixed_crops,
    )


def check_returns(crops: Crops, setting: str) -> None:
    """Refuse to keep what is made of crops that never come again.

    Raises:
        SettingsError: a photo is cropped anew whenever it is drawn.
    """
    if crops.varying:
        raise SettingsError(
            f"{setting} keeps what networks make of a crop for the next time, but {crops.varying} of {len(crops)} "
            f"photos are cropped anew each time; set fixed_crops, or leave {setting} off."
        )


def check_pairs_return(crops: Crops) -> None:
    """As `check_returns` for `cache_pairs`.

    Raises:
        SettingsError: the photos have no degraded partners, or are cropped anew whenever they are drawn.
    """
    if not crops.paired:
        raise SettingsError(
            "cache_pairs is for photos with a degraded partner (LR), and these have none; leave it off, or set pool to "
            "use degraded batches more than once."
        )
    check_returns(crops, "cache_pairs")


def check_groups(loop: LoopConfig, group: int) -> None:
    """Refuse to divide a batch within a group.

    Raises:
        SettingsError: the parts of a batch are no multiples of `group`.
    """
    if loop.parts > 1 and loop.micro_batch % group:
        raise SettingsError(
            f"Each pass has {loop.micro_batch} images, which is no multiple of degradation_group ({group}): images of "
            "one group would be degraded apart. Choose another accumulation, or degradation_group 1."
        )
