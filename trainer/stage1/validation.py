"""How stage 1 is judged while it trains: photos kept out, and what each tagger sees on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seesr_core.dape import DAPEOutput, Vocabulary
from seesr_core.errors import DataError
from seesr_core.method.losses import prompt_loss
from seesr_core.runtime.files import atomic_write

from ..data.crops import Crops
from ..data.order import Stream, by_image
from ..data.photos import Photo
from ..engine.samples import save_grid
from .recipes import Stage1Config

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


SHOWN_TAGS = 10


def hold_out(photos: Sequence[Photo], count: int) -> tuple[list[Photo], list[Photo]]:
    """The photos to train on, and `count` others taken evenly from all over the list.

    Raises:
        DataError: nothing would be left to train on.
    """
    if len(photos) <= count:
        raise DataError(
            f"{len(photos)} photos are too few: {count} are kept out to be shown. Add photos or lower samples."
        )
    shown = {index * len(photos) // count for index in range(count)}
    return [p for i, p in enumerate(photos) if i not in shown], [p for i, p in enumerate(photos) if i in shown]


class Shown:
    """The photos that are kept out, and what is told of them.

    Args:
        crops: of these photos.
        config: of the run.
        vocabulary: names of the tags.
    """

    def __init__(self, crops: Crops, config: Stage1Config, vocabulary: Vocabulary) -> None:
        self.crops, self.config, self.vocabulary = crops, config, vocabulary

    def drawn(self) -> Tensor:
        """One crop of each photo, uint8 (N, 3, size, size), always the same."""
        draws = by_image(self.config.loop.seed, Stream.STAGE1_SHOWN, images=range(len(self.crops)))
        return torch.stack([self.crops.crop(i, generator) for i, generator in enumerate(draws)])

    def write(
        self, folder: Path, step: int, lr: Tensor, hr: Tensor, seen: Mapping[str, DAPEOutput]
    ) -> dict[str, float]:
        """Write HR above degraded as a picture, and what each tagger sees in them as JSON.

        Returns equation 1 of these photos with and without the adapter.
        """
        save_grid(folder / f"{step:07d}.png", [hr, F.interpolate(lr, hr.shape[-2:])], ("HR", "LR"))
        with atomic_write(folder / f"{step:07d}.json") as temporary:
            temporary.write_text(json.dumps(report := self._report(seen), indent=1, ensure_ascii=False), "utf-8")
        return {"val_loss": report["loss_dape"], "val_loss_plain": report["loss_plain"]}

    def _report(self, seen: Mapping[str, DAPEOutput]) -> dict[str, Any]:
        """Equation 1 without and with the adapter, and the strongest tags of each photo."""
        tags = {name: self.vocabulary.select(output.logits_BN, max_tags=SHOWN_TAGS) for name, output in seen.items()}
        photos = [
            {"photo": photo.path.name, **{name: [tag.name for tag in found[i]] for name, found in tags.items()}}
            for i, photo in enumerate(self.crops.photos)
        ]
        target = seen["teacher_on_hr"]
        weight, looks = self.config.logits_weight, (seen["plain_on_lr"], seen["dape_on_lr"])
        losses = (prompt_loss(*look, *target, weight=weight) for look in looks)
        plain, dape = (loss.total.item() for loss in losses)
        return {"loss_plain": plain, "loss_dape": dape, "photos": photos}
