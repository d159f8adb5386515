"""The small model's tagger: RAM's head on EfficientNet-Lite0, trained on what that network sees and on photos' words.

The encoder stays as it was trained on ImageNet; the head learns from pseudo-labels, the probabilities of the network's
own classes said in words (`classes`), and from the words that photos bring. Of words that no class stands for a missing
one means unknown rather than absent, so their loss is asymmetric as RAM's own training was: easy negatives count
little, and every positive fully. A linear classifier on the mean token learns beside the tagging head and is dropped at
the end: the projection of the tokens learns little through two new layers of cross-attention alone. A share of the
photos is kept out, to fit the thresholds and to measure on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
from ..deep_features import EfficientNetLite0, load_efficientnet
from ..engine.journal import Figures
from ..engine.loop_config import LoopConfig
from .classes import class_words, membership, word_probabilities


@dataclass(kw_only=True, slots=True)
class TaggerConfig:
    """How the tagger is trained."""

    loop: LoopConfig
    """Settings of the optimisation."""
    image_size: int = 256
    """Side that images are resized to, a multiple of 32. The larger, the more the tagger sees that a degraded photo
    lacks, and so the more stage 1 has to teach."""
    min_count: int = 6
    """Words on fewer photos than this are left out of the vocabulary, unless a class stands for them."""
    holdout_every: int = 6
    """Every n-th photo with words is never trained on."""
    min_crop: float = 0.35
    """Smallest area of a random crop, as a share of the photo."""
    jitter: float = 0.25
    """Brightness, contrast and saturation are multiplied by factors up to this far from 1."""
    channel_shuffle: float = 0.0
    """Probability that a crop's colour channels are put in random order. A tagger brought up from nothing that may go
    by colours hardly looks at the detail that degradation destroys."""
    focus: float = 1.0
    """Exponent by which easy negatives are weighted down."""
    pretrained: bool = True
    """Whether the image encoder is EfficientNet-Lite0 as it was trained on ImageNet (`trainer.deep_features`), frozen,
    and its classes give pseudo-labels; else it is trained from nothing on the photos' words."""
    own_confidence: float = 0.9
    """What a photo's own word counts for as a label, beside probabilities of classes."""
    imagined: float = 0.5
    """Share of the pictures into whose features a class is written that they do not show: the photos show many of
    the classes rarely or never, and a head would not learn their words."""
    words_at_once: int = 96
    """Words a step that are asked for besides those that a photo of the batch carries, drawn anew each time and
    weighted so that they stand for all others."""


def tagger_config(num_tags: int, image_size: int = 256) -> DAPEConfig:
    """Sizes of the small tagger: about 5 M parameters, 65 tokens of width 256 at 256 px."""
    return DAPEConfig(
        swin=None,
        lite=LiteConfig(image_size=image_size),
        head=HeadConfig(hidden=256, heads=4, layers=2, intermediate=512, encoder_width=256, dropout=0.0),
        num_tags=num_tags,
        label_width=128,
    )


def frequent_words(photos: Sequence[Photo], min_count: int, *, classes: bool = False) -> tuple[str, ...]:
    """The words on at least `min_count` photos, and with `classes` those of ImageNet's classes, too; sorted."""
    counts = Counter(word for photo in photos for word in photo.tags)
    frequent = {word for word, count in counts.items() if count >= min_count}
    return tuple(sorted(frequent.union(*class_words()) if classes else frequent))


def split(photos: Sequence[Photo], holdout_every: int, *, untagged: bool = False) -> tuple[list[Photo], list[Photo]]:
    """Photos with words, divided into those trained on and those kept out; `untagged` ones may be trained on, too."""
    tagged = [photo for photo in photos if photo.tags]
    kept = tagged[holdout_every - 1 :: holdout_every]
    return [photo for photo in (photos if untagged else tagged) if photo not in set(kept)], kept


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


_RARE = -4.0
"""Logit at which a word starts when there are hundreds: few are on any photo."""


class Asked(NamedTuple):
    """The words of one step."""

    words: Tensor
    """Their places in the vocabulary (N,)."""
    weights: Tensor
    """How many words each of them stands for (N,)."""


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
        self.membership = membership(words).to(self.device) if config.pretrained else None
        if start is not None:
            check_start(start, self.tagger.config)
            self.tagger.load_state_dict(start.state_dict())
        if config.pretrained:
            self._begin_as_trained(load_efficientnet(), fresh=start is None)
        classifier = nn.Linear(self.tagger.config.token_width, len(words))
        nn.init.zeros_(classifier.weight)
        nn.init.constant_(classifier.bias, _RARE if config.pretrained else 0.0)
        self.trained = nn.ModuleDict({"tagger": self.tagger, "classifier": classifier}).to(self.device).train()

    def _begin_as_trained(self, network: EfficientNetLite0, *, fresh: bool) -> None:
        """Take the encoder over, frozen; embeddings of new tags start as the classifier's rows for their classes."""
        assert self.membership is not None
        encoder = self.tagger.visual_encoder
        encoder.load_state_dict({name: network.get_parameter(name) for name in encoder.state_dict()})
        encoder.requires_grad_(False)
        self.classes = network._fc.to(self.device)
        if fresh:
            embeddings = class_embeddings(network._fc.weight, self.membership.cpu(), self.tagger.config.label_width)
            seen = self.membership.any(0).cpu()
            self.tagger.label_embed.data[seen] = embeddings[seen]
            nn.init.constant_(self.tagger.fc.bias, _RARE)

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """Loss of one augmented batch, of the head and of the linear classifier."""
        numbers = self.config.loop.images(step)
        indices = [epoch_order(number, len(self.images), self.config.loop.seed) for number in numbers]
        draws = by_image(self.config.loop.seed, Stream.CROP, images=numbers)
        crops = [self._crop(i, generator) for i, generator in zip(indices, draws, strict=True)]
        features = self.tagger.visual_encoder(torch.stack(crops).to(self.device))
        if self.membership is not None:
            features = self._imagined(features, by_image(self.config.loop.seed, Stream.NANO_IMAGINED, images=numbers))
        labels = self._labels(indices, features[:, 0])
        asked = self._asked(labels, seeded(self.config.loop.seed, Stream.NANO_WORDS, step))
        tokens = self.tagger.image_proj(features)
        logits = self.tagger.tag_logits(tokens, asked.words.tolist())
        mean = F.layer_norm(tokens.float().mean(1), tokens.shape[2:])
        head = (self._by_word(logits, labels, asked.words) * asked.weights).sum(1).mean()
        linear = self._by_word(self.trained["classifier"](mean), labels, torch.arange(labels.shape[1])).sum(1).mean()
        return head + 0.5 * linear, {"head": head.detach(), "linear": linear.detach()}

    @torch.no_grad()
    def _imagined(self, features_BLD: Tensor, draws: Iterable[torch.Generator]) -> Tensor:
        """Add a class's direction in the classifier to a rectangle of the features of some pictures.

        The classifier then sees that class there, more or less surely, since its logit of the mean grows by a drawn
        3 to 13; the values stay those of the network's ReLU6. Token 0, the mean, follows.
        """
        places, side = features_BLD[:, 1:].clone(), self.tagger.config.grid
        rows_KD = self.classes.weight - self.classes.weight.mean(0)
        for place_LD, generator in zip(places, draws, strict=True):
            u = torch.rand(6, generator=generator).tolist()
            if u[0] < self.config.imagined:
                row = rows_KD[int(u[1] * len(rows_KD))]
                h, w = (max(1, round(side * (0.4 + 0.6 * draw))) for draw in u[2:4])
                top, left = (int(draw * (side - length + 1)) for draw, length in ((u[4], h), (u[5], w)))
                gain = (3 + 10 * torch.rand((), generator=generator).item()) * side**2 / (h * w)
                place_LD.view(side, side, -1)[top : top + h, left : left + w] += gain * row / row.square().sum()
        places = places.clamp(0.0, 6.0)
        return torch.cat([places.mean(1, keepdim=True), places], dim=1)

    @torch.no_grad()
    def _labels(self, indices: Sequence[int], mean_BC: Tensor) -> Tensor:
        """What each picture is told to show, (B, words) in [0, 1]: its classes' words, and its own."""
        own = self.targets[list(indices)].to(self.device) * self.config.own_confidence
        if self.membership is None:
            return own
        return torch.maximum(own, word_probabilities(self.classes(mean_BC.float()), self.membership))

    @torch.no_grad()
    def truth(self, photos: Sequence[Photo], words: Sequence[str]) -> Tensor:
        """1 where a word is a photo's own or its likely classes mean it, to fit thresholds: float (photos, words)."""
        own = targets(photos, words)
        if self.membership is None:
            return own
        seen = (self.tagger.visual_encoder(pictures)[:, 0] for pictures in _pictures(self.tagger, photos))
        logits = [self.classes(mean).cpu() for mean in seen]
        return torch.maximum(own, (word_probabilities(torch.cat(logits), self.membership.cpu()) > 0.5).float())

    def _asked(self, labels_BN: Tensor, generator: torch.Generator) -> Asked:
        """Every word that a picture shows, and some of the others."""
        shown = labels_BN.amax(0).cpu() > 0.15
        absent = (~shown).nonzero().flatten()
        drawn = absent[torch.randperm(len(absent), generator=generator)[: self.config.words_at_once]]
        weights = torch.ones(int(shown.sum()) + len(drawn))
        weights[len(weights) - len(drawn) :] = len(absent) / max(len(drawn), 1)
        return Asked(torch.cat([shown.nonzero().flatten(), drawn]), weights.to(self.device))

    def _by_word(self, logits_BN: Tensor, labels: Tensor, words: Tensor) -> Tensor:
        """The loss of each picture and word: cross-entropy where a class stands for the word, else asymmetric."""
        target = labels[:, words.to(labels.device)]
        loss = asymmetric_loss(logits_BN.float(), target, self.config.focus)
        if self.membership is None:
            return loss
        known = self.membership.any(0)[words.to(labels.device)]
        exact = F.binary_cross_entropy_with_logits(logits_BN.float(), target, reduction="none")
        return torch.where(known, exact, loss)

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
    """−y·log p − (1 − y)·p_m^focus·log(1 − p_m) with p_m = max(p − margin, 0), of each picture and word."""
    positive = target * F.logsigmoid(logits)
    p = (logits.sigmoid() - margin).clamp_min(0)
    negative = (1 - target) * p.pow(focus) * (1 - p).clamp_min(1e-8).log()
    return -(positive + negative)


def class_embeddings(weight_KC: Tensor, membership_KN: Tensor, width: int) -> Tensor:
    """Words as the rows of a classifier for their classes, in its first principal directions: (N, width).

    RAM's embeddings begin as text features in the same way: words of like things begin alike. Their deviation is 1,
    but for words without a class, which are 0.
    """
    rows = weight_KC - weight_KC.mean(0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:width]
    found = membership_KN.T @ rows @ directions.T / membership_KN.sum(0).clamp_min(1).sqrt()[:, None]
    known = membership_KN.any(0)
    return found / found[known].std() if known.any() else found


@torch.no_grad()
def predict(model: DAPE, photos: Sequence[Photo]) -> Tensor:
    """Logits (photos, words) of the plain photos."""
    return torch.cat([model(pictures).logits_BN.float().cpu() for pictures in _pictures(model, photos)])


def _pictures(model: DAPE, photos: Sequence[Photo], batch: int = 32) -> Iterator[Tensor]:
    """The photos as the tagger looks at them, some at a time."""
    device = next(model.parameters()).device
    for first in range(0, len(photos), batch):
        images = [load_rgb(photo.path)[None].float().div(255) for photo in photos[first : first + batch]]
        yield torch.cat([tagger_input(image, model.config.image_size) for image in images]).to(device)


def fit_thresholds(scores: Tensor, target: Tensor, *, default: float = 0.35, floor: float = 0.2) -> Tensor:
    """Thresholds (words,) with the best F1 on kept-out photos; scores and targets are (photos, words).

    Words with fewer than three examples keep `default`.
    """
    grid = torch.arange(floor, 0.95, 0.02)
    chosen = scores[:, :, None] > grid
    hits = (chosen & (target[:, :, None] > 0)).sum(0).float()
    f1 = 2 * hits / (chosen.sum(0) + target.sum(0)[:, None]).clamp_min(1)
    best = grid[f1.argmax(1)]
    return torch.where(target.sum(0) >= 3, best, torch.full_like(best, default))
