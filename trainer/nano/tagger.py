"""The small model's tagger: RAM's head on EfficientNet-Lite0, trained on the photos' own words.

The encoder starts as it was trained on ImageNet, everything else from nothing. A missing word means unknown rather than
absent, so the loss is asymmetric as RAM's own training was: easy negatives count little, and every positive fully. A
linear classifier on the mean token learns beside the tagging head and is dropped at the end: an encoder learns little
through two new layers of cross-attention alone. A share of the photos is kept out, to fit the thresholds and to measure
on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr_core.dape.efficientnet import LiteConfig
from seesr_core.dape.head import HeadConfig
from seesr_core.dape.model import DAPE, DAPEConfig
from seesr_core.dape.preprocess import normalize, tagger_input
from seesr_core.errors import SettingsError

from ..data.order import Stream, by_image, epoch_order, seeded
from ..data.photos import Photo, load_rgb
from ..deep_features import load_efficientnet
from ..engine.journal import Figures
from ..engine.loop_config import LoopConfig


@dataclass(kw_only=True, slots=True)
class TaggerConfig:
    """How the tagger is trained."""

    loop: LoopConfig
    """Settings of the optimisation."""
    image_size: int = 256
    """Side that images are resized to, a multiple of 32. The larger, the more the tagger sees that a degraded photo
    lacks, and so the more stage 1 has to teach."""
    min_count: int = 12
    """Words on fewer photos than this are left out of the vocabulary."""
    holdout_every: int = 6
    """Every n-th photo with words is never trained on."""
    min_crop: float = 0.64
    """Smallest area of a random crop, as a share of the photo. Smaller crops of small photos would be enlarged, and a
    tagger brought up on enlarged photos looks past fine detail."""
    jitter: float = 0.4
    """Brightness, contrast and saturation are multiplied by factors up to this far from 1."""
    channel_shuffle: float = 0.8
    """Probability that a crop's colour channels are put in random order. A tagger that may go by colours hardly looks
    at the detail that degradation destroys."""
    focus: float = 1.0
    """Exponent by which easy negatives are weighted down."""
    pretrained: bool = True
    """Whether the image encoder starts as EfficientNet-Lite0 was trained on ImageNet (`trainer.deep_features`)."""


def tagger_config(num_tags: int, image_size: int = 256) -> DAPEConfig:
    """Sizes of the small tagger: about 5 M parameters, 65 tokens of width 256 at 256 px."""
    return DAPEConfig(
        swin=None,
        lite=LiteConfig(image_size=image_size),
        head=HeadConfig(hidden=256, heads=4, layers=2, intermediate=512, encoder_width=256, dropout=0.0),
        num_tags=num_tags,
        label_width=128,
    )


def frequent_words(photos: Sequence[Photo], min_count: int) -> tuple[str, ...]:
    """The words on at least `min_count` photos, sorted."""
    counts = Counter(word for photo in photos for word in photo.tags)
    return tuple(sorted(word for word, count in counts.items() if count >= min_count))


def split(photos: Sequence[Photo], holdout_every: int) -> tuple[list[Photo], list[Photo]]:
    """Photos with words, divided into those trained on and those kept out."""
    tagged = [photo for photo in photos if photo.tags]
    kept = tagged[holdout_every - 1 :: holdout_every]
    return [photo for photo in tagged if photo not in set(kept)], kept


def targets(photos: Sequence[Photo], words: Sequence[str]) -> Tensor:
    """1 where a photo carries a word: float (photos, words)."""
    return torch.tensor([[float(word in photo.tags) for word in words] for photo in photos])


def check_start(tagger: DAPE, config: DAPEConfig) -> None:
    """Refuse a tagger whose weights do not fit another of sizes `config`; that of the pictures may differ.

    Raises:
        SettingsError: another image encoder, other sizes or another number of words.
    """
    if tagger.config.lite is None:
        raise SettingsError(
            "The tagger to start from has a Swin encoder, the one to be trained EfficientNet-Lite0; start afresh."
        )
    if replace(config, lite=tagger.config.lite) != tagger.config:
        raise SettingsError(
            "The tagger to start from should have the sizes and the number of words of the one to be trained; they "
            "differ. Give the photos and min_count that it was trained with, or start afresh."
        )


class TaggerTask:
    """Multi-label classification of augmented photos."""

    def __init__(
        self, config: TaggerConfig, photos: Sequence[Photo], words: Sequence[str], start: DAPE | None = None
    ) -> None:
        self.config, self.device = config, config.loop.resolve_device()
        self.targets = targets(photos, words)
        self.images = [load_rgb(photo.path) for photo in photos]
        self.tagger = DAPE(tagger_config(len(words), config.image_size))
        self.tagger.initialize(seeded(config.loop.seed, Stream.NANO_WEIGHTS))
        if start is not None:
            check_start(start, self.tagger.config)
            self.tagger.load_state_dict(start.state_dict())
        elif config.pretrained:
            network = load_efficientnet()
            wanted = self.tagger.visual_encoder.state_dict()
            self.tagger.visual_encoder.load_state_dict({name: network.get_parameter(name) for name in wanted})
        classifier = nn.Linear(self.tagger.config.token_width, len(words))
        nn.init.zeros_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        self.trained = nn.ModuleDict({"tagger": self.tagger, "classifier": classifier}).to(self.device).train()

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """Asymmetric loss of one augmented batch, of the head and of the linear classifier."""
        numbers = self.config.loop.images(step)
        indices = [epoch_order(number, len(self.images), self.config.loop.seed) for number in numbers]
        draws = by_image(self.config.loop.seed, Stream.CROP, images=numbers)
        crops = [self._crop(i, generator) for i, generator in zip(indices, draws, strict=True)]
        tokens, logits = self.tagger(torch.stack(crops).to(self.device))
        mean = F.layer_norm(tokens.float().mean(1), tokens.shape[2:])
        target, focus = self.targets[indices].to(self.device), self.config.focus
        head = asymmetric_loss(logits.float(), target, focus)
        linear = asymmetric_loss(self.trained["classifier"](mean).float(), target, focus)
        return head + linear, {"head": head.detach(), "linear": linear.detach()}

    def _crop(self, index: int, generator: torch.Generator) -> Tensor:
        """Random resized crop, flip, order of channels and jitter of colours; normalised (3, size, size)."""
        u = torch.rand(9, generator=generator).tolist()
        image = self.images[index]
        area, aspect = self.config.min_crop + (1 - self.config.min_crop) * u[0], 2 ** (u[1] - 0.5)
        height, width = image.shape[1:]
        h, w = (min(side, round(side * area**0.5 * f)) for side, f in ((height, aspect), (width, 1 / aspect)))
        top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
        patch = image[None, :, top : top + h, left : left + w].float().div(255)
        patch = F.interpolate(patch, (self.config.image_size,) * 2, mode="bilinear", antialias=True)
        patch = patch.flip(3) if u[4] < 0.5 else patch
        patch = patch[:, torch.randperm(3, generator=generator)] if u[8] < self.config.channel_shuffle else patch
        return normalize(_jitter(patch, *(1 + self.config.jitter * (2 * draw - 1) for draw in u[5:8])))[0]

    def sample(self, folder: Path, step: int) -> None:
        """A tagger draws no pictures; its figures are in the log and in the report."""


def _jitter(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Each of the three is a factor, of which 1 changes nothing."""
    image = image * brightness
    mean = image.mean((2, 3), keepdim=True).mean(1, keepdim=True)
    image = mean + (image - mean) * contrast
    grey = image.mean(1, keepdim=True)
    return (grey + (image - grey) * saturation).clamp(0, 1)


def asymmetric_loss(logits: Tensor, target: Tensor, focus: float, margin: float = 0.05) -> Tensor:
    """−y·log p − (1 − y)·p_m^focus·log(1 − p_m) with p_m = max(p − margin, 0); sum over words, mean over images."""
    positive = target * F.logsigmoid(logits)
    p = (logits.sigmoid() - margin).clamp_min(0)
    negative = (1 - target) * p.pow(focus) * (1 - p).clamp_min(1e-8).log()
    return -(positive + negative).sum(1).mean()


@torch.no_grad()
def predict(model: DAPE, photos: Sequence[Photo], *, batch: int = 32) -> Tensor:
    """Logits (photos, words) of the plain photos."""
    device = next(model.parameters()).device
    size = model.config.image_size
    images = [tagger_input(load_rgb(photo.path)[None].float().div(255), size) for photo in photos]
    return torch.cat(
        [
            model(torch.cat(images[i : i + batch]).to(device)).logits_BN.float().cpu()
            for i in range(0, len(images), batch)
        ]
    )


def fit_thresholds(scores: Tensor, target: Tensor, *, default: float = 0.5, floor: float = 0.2) -> Tensor:
    """Thresholds (words,) with the best F1 on kept-out photos; scores and targets are (photos, words).

    Words with fewer than three examples keep `default`.
    """
    grid = torch.arange(floor, 0.95, 0.02)
    chosen = scores[:, :, None] > grid
    hits = (chosen & (target[:, :, None] > 0)).sum(0).float()
    f1 = 2 * hits / (chosen.sum(0) + target.sum(0)[:, None]).clamp_min(1)
    best = grid[f1.argmax(1)]
    return torch.where(target.sum(0) >= 3, best, torch.full_like(best, default))
