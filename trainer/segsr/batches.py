"""From photos and labels to the inputs of a training step of SegSR.

Shape letters: B images, N bits of a label, C channels of the picture's latents, h w latent cells.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seesr_core.pictures.sizes import from_u8
from seesr_core.segsr.labels import codes, label_latent

from ..data.ahead import Ahead
from ..data.crops import Crops
from ..data.order import Stream, by_image
from ..data.pool import Prepared
from ..stage2.batches import Batch, Batches
from .masks import Masks
from .recipes import SegSRTrainConfig


class LabelCrops(Crops):
    """The labels under the crops of photos: the same windows, mirrored alike, each pixel the nearest one's."""

    def __init__(self, crops: Crops, masks: Masks) -> None:
        self.__dict__.update(vars(crops))
        self.crops, self.masks = crops, masks
        self._ahead = Ahead(self._make, 0, 1)

    def image(self, index: int) -> Tensor:
        """The labels of photo `index` whole, uint8 (1, H, W)."""
        return self.masks.get(self.photos[index], self.crops.image(index).shape[1:])[None]

    def _resized(self, patch: Tensor) -> Tensor:
        return F.interpolate(patch[None].float(), (self.size, self.size), mode="nearest-exact")[0].to(torch.uint8)

    def under(self, number: int, count: int) -> Tensor:
        """The labels of part `number` of the training, int64 (count, size, size)."""
        found = self.pairs(number, count)[0] if self.paired else self.batch(number, count)[0]
        return found[:, 0].long()


@dataclass(slots=True)
class PreparedLabels(Prepared):
    """What of a batch is the same whenever it is drawn."""

    z_lr: Tensor
    """Scaled latents of the upsampled LR (B, C, h, w)."""
    labels: Tensor
    """Labels of the crops, uint8 (B, H, W)."""


@dataclass(slots=True)
class LabelledBatch(Batch):
    """The inputs of one training step of SegSR, on the training device but for what is decided by."""

    z_lr: Tensor
    """Scaled latents of the upsampled LR (B, C, h, w)."""
    labels: Tensor
    """Labels of the crops, int64 (B, H, W)."""
    bits: Tensor
    """s0, the labels' bits at the latent's resolution (B, N, h, w); 0 for void."""
    label_noise: Tensor
    """Noise of the segmentation's latent."""
    index: Tensor
    """Which timestep of the sampling grid each image is trained at (B,), on the CPU."""
    own: Tensor
    """Whether it comes there through passes of the networks (B,), bool, on the CPU."""
    told: tuple[Tensor, Tensor]
    """Noise of the true latents and bits that the others are told."""


class LabelledBatches(Batches):
    """The batches of a run.

    Args:
        config: of the run.
        given: what stage 2's batches are made of.
        labels: of the crops.
        options: of stage 2's batches.
    """

    config: SegSRTrainConfig
    prepared_type = PreparedLabels

    def __init__(self, config: SegSRTrainConfig, *given: Any, labels: LabelCrops, **options: Any) -> None:
        self.labels = labels
        super().__init__(config, *given, **options)

    def get(self, number: int) -> LabelledBatch:
        """All inputs of part `number` of the training, on the training device."""
        return self.draw(number, self.prepared(number))

    def prepare(self, number: int) -> PreparedLabels:
        """Part `number` made anew."""
        made = Batches.prepare(self, number)
        condition = from_u8(made.condition.to(self.device))
        with torch.no_grad():
            z_lr = self.networks.encode_mode(condition).cpu()
        labels = self.labels.under(number, len(made.photos)).to(torch.uint8)
        return PreparedLabels(**{f.name: getattr(made, f.name) for f in fields(Prepared)}, z_lr=z_lr, labels=labels)

    def draw(self, number: int, prepared: Any) -> LabelledBatch:
        """All that is drawn for a prepared part."""
        batch = Batches.draw(self, number, prepared)
        config, code = self.config, codes(len(self.labels.masks.classes), self.config.embedding)
        grid, size = torch.tensor(config.grid()), batch.latents.shape[2:]
        draws = by_image(config.loop.seed, Stream.SEGSR, images=config.loop.images(number))
        u, p = (torch.cat([torch.rand(1, generator=g) for g in draws]) for _ in range(2))

        def noise(channels: int) -> Tensor:
            return torch.stack([torch.randn(channels, *size, generator=g) for g in draws]).to(self.device)

        index = (
            (u * len(grid)).long().clamp(max=len(grid) - 1)
            if config.mode != "segmenter"
            else torch.zeros_like(u).long()
        )
        labels, bits = prepared.labels.long(), code.shape[1]
        batch.timesteps = grid[index].to(self.device)
        return LabelledBatch(
            **{f.name: getattr(batch, f.name) for f in fields(Batch)},
            z_lr=prepared.z_lr.to(self.device),
            labels=labels,
            bits=label_latent(labels, code, *size).to(self.device),
            label_noise=noise(bits),
            index=index,
            own=p < config.own,
            told=(noise(batch.latents.shape[1]), noise(bits)),
        )

    def key(self) -> str:
        """Everything that a prepared batch depends on."""
        return f"{super().key()} {self.labels.masks.fingerprint()}"
