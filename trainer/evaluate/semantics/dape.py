"""`python -m trainer.evaluate.dape`: is the tagger any good, and what does stage 1 add on degraded photos?

Three questions, three tables:

- *robustness*: the tagger's own words on the clean photo are the truth; how well do the tagger and DAPE find them on
  the degraded photo? Tags are ranked by how far they are above their own thresholds, as the tagger chooses them; by
  the bare score not even the clean photo would find all its words first. Over tags only those count that the tagger
  believes on some photos, not all.
- *labels*: human words are the truth; how well does the tagger rank them, against a baseline that always gives the
  words' frequencies in training? A word that nobody wrote down is unknown rather than absent but has to count as absent
  here, so all these figures, the baseline's included, are too low rather than too high.
- *degraded labels*: human words are the truth; how well do the tagger and DAPE rank them on the degraded photo?

Mean average precision comes over tags (each ranks the photos; a constant tagger gets the share of positives) and over
photos (each ranks the tags; here the frequency baseline is strong). Intervals are 95 % bootstrap over photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seesr_core.dape import DAPE, DAPEOutput, Vocabulary, tagger_input
from seesr_core.errors import DataError, SettingsError
from seesr_core.pictures.sizes import from_u8

from ...data.order import Stream, seeded
from ...data.photos import Photo, load_rgb, read_photos
from ...degradation import DegradationConfig
from ...nano.tagger import predict, split, targets
from ...stage1.networks import read_teacher
from ..report.intervals import Estimate, resamples
from ..report.tables import Column, markdown, show, write_json
from ..testsets.make import degraded
from .ranking import map_over_photos, map_over_tags


@dataclass(kw_only=True, slots=True)
class Options:
    """Compare a tagger with its DAPE on degraded photos, and the tagger with human words."""

    tagger: Path
    """The un-tuned tagger: `dape*.safetensors` format, or RAM's file with --tag-lists."""
    dape: Path
    """The tagger after stage 1, merged."""
    photos: Path
    """Photos that neither was trained on: a folder or .jsonl list; those with tags are used for the labels, too."""
    json: Path
    """Report to write."""
    train_photos: Path | None = None
    """The list that both were trained on: gives the words' frequencies, and the photos that training kept out are
    added to `photos`."""
    holdout_every: int = 6
    """Every n-th photo with words of that list was kept out (setting of the tagger's recipe)."""
    tag_lists: Path | None = None
    """Folder with RAM's tag lists, for RAM's published file."""
    seed: int = 0
    """Seed that degradation and bootstrap derive from."""
    repeats: int = 3
    """Different degradations of each photo."""
    min_photos: int = 5
    """Human words on fewer photos are left out of the mean over tags: their average precision is chance."""
    resamples: int = 1000
    """Bootstrap resamples."""
    limit: int = 0
    """Most photos to take; 0 takes all."""

    def __post_init__(self) -> None:
        if min(self.holdout_every, self.repeats, self.min_photos, self.resamples) < 1 or self.limit < 0:
            raise SettingsError(
                "holdout-every, repeats, min-photos and resamples must be at least 1, limit at least 0."
            )


def evaluate(options: Options) -> dict[str, Any]:
    """All tables; writes and returns the report.

    Raises:
        SeeSRError: files that cannot be used, or taggers with different words.
    """
    tagger, vocabulary = read_teacher(options.tagger, options.tag_lists)
    dape, words = read_teacher(options.dape)
    if words.tags != vocabulary.tags:
        raise DataError(f"{options.tagger} and {options.dape} know different words; give a tagger and its own DAPE.")
    photos, training = photos_to_show(options)
    degraded_photos = photos[: options.limit or None]
    looks = look(tagger, dape, degraded_photos, options)
    report = {
        "settings": {"seed": options.seed, "repeats": options.repeats, "resamples": options.resamples},
        "robustness": robustness(looks, vocabulary, options),
        "labels": labels(tagger, vocabulary, photos, training, options),
        "degraded_labels": degraded_labels(looks, vocabulary, degraded_photos, options),
    }
    write_json(options.json, report)
    return report


def photos_to_show(options: Options) -> tuple[list[Photo], list[Photo]]:
    """Photos that the tagger never saw, and those that it was trained on as far as they are named."""
    listed = read_photos(options.train_photos) if options.train_photos else []
    training, kept = split(listed, options.holdout_every)
    return [*read_photos(options.photos), *kept], training


@dataclass(kw_only=True, slots=True)
class Looks:
    """What the tagger makes of N clean photos, and what it and DAPE make of `repeats` degradations of each."""

    clean: DAPEOutput
    """The tagger on the clean photos, N rows."""
    degraded: dict[str, DAPEOutput]
    """Tagger and DAPE on the degraded ones, repeats · N rows: all photos degraded once, then all again."""


@torch.no_grad()
def look(tagger: DAPE, dape: DAPE, photos: Sequence[Photo], options: Options) -> Looks:
    """Degrade the photos and let both look at them."""
    size = tagger.config.image_size
    clean = [load_rgb(photo.path) for photo in photos]
    names = [photo.path.name for photo in photos]
    lr = [
        input_of(image, size) for repeat in range(options.repeats) for image in _degrade(clean, names, repeat, options)
    ]
    return Looks(
        clean=run_tagger(tagger, [input_of(image, size) for image in clean]),
        degraded={"tagger": run_tagger(tagger, lr), "DAPE": run_tagger(dape, lr)},
    )


def robustness(looks: Looks, vocabulary: Vocabulary, options: Options) -> dict[str, Any]:
    """Tagger and DAPE on degraded photos, against the tagger's own words on the clean ones.

    Raises:
        DataError: the tagger says the same of all clean photos.
    """
    believed = looks.clean.logits_BN.sigmoid() > vocabulary.thresholds
    telling = believed.any(0) & ~believed.all(0)
    if not telling.any():
        raise DataError("The tagger says the same of all clean photos, so there is nothing to rank; give more photos.")
    draws = seeded(options.seed, Stream.DAPE_INTERVAL)
    weights = resamples(len(believed), options.resamples, draws).repeat(1, options.repeats)
    bounds = vocabulary.thresholds.logit(eps=1e-6)
    scores = {name: row.logits_BN - bounds for name, row in looks.degraded.items()}
    precision = precision_rows(scores, believed.repeat(options.repeats, 1), telling, weights)
    target = looks.clean.tokens_BLD.repeat(options.repeats, 1, 1)
    errors = {name: F.mse_loss(row.tokens_BLD, target).item() for name, row in looks.degraded.items()}
    return {
        "photos": len(believed),
        "tags": int(telling.sum()),
        "rows": {name: {**figures, "soft_prompt_mse": errors.get(name)} for name, figures in precision.items()},
    }


def _degrade(clean: Sequence[Tensor], names: Sequence[str], repeat: int, options: Options) -> list[Tensor]:
    """One degradation of each photo, cut to whole LR pixels."""
    config = DegradationConfig()
    cut = [image[:, : image.shape[1] // 4 * 4, : image.shape[2] // 4 * 4] for image in clean]
    return [
        degraded(image, f"{name} {repeat}", config, seed=options.seed) for image, name in zip(cut, names, strict=True)
    ]


def input_of(image_3HW: Tensor, size: int) -> Tensor:
    """The tagger's input (1, 3, size, size) of a uint8 picture, as in use."""
    return tagger_input(from_u8(image_3HW[None]), size)


def run_tagger(tagger: DAPE, inputs: Sequence[Tensor], *, batch: int = 16) -> DAPEOutput:
    """Outputs of all inputs, each (1, 3, size, size)."""
    parts = [tagger(torch.cat(list(inputs[i : i + batch]))) for i in range(0, len(inputs), batch)]
    tokens, logits = (torch.cat([part[index].float() for part in parts]) for index in (0, 1))
    return DAPEOutput(tokens, logits)


def precision_rows(
    scores: dict[str, Tensor], positive_NT: Tensor, telling_T: Tensor, weights_RN: Tensor
) -> dict[str, dict[str, Any]]:
    """Mean average precision in percent, over tags only of the telling ones; of two rivals also second − first."""
    rivals = tuple(scores) if len(scores) == 2 else None
    rows: dict[str, dict[str, Any]] = {name: {} for name in (*scores, *(["difference"] if rivals else []))}
    every_T = torch.ones_like(telling_T)
    for key, figure, kept_T in (("map_tags", map_over_tags, telling_T), ("map_photos", map_over_photos, every_T)):
        positive = positive_NT[:, kept_T]
        values = {name: 100 * figure(score[:, kept_T], positive) for name, score in scores.items()}
        spread = {name: 100 * figure(score[:, kept_T], positive, weights_RN) for name, score in scores.items()}
        if rivals:
            first, second = rivals
            values["difference"] = values[second] - values[first]
            spread["difference"] = spread[second] - spread[first]
        for name, row in rows.items():
            least = -100.0 if name == "difference" else 0.0
            row[key] = Estimate.of(values[name], spread[name], least=least, most=100.0)._asdict()
    return rows


@torch.no_grad()
def labels(
    tagger: DAPE, vocabulary: Vocabulary, photos: Sequence[Photo], training: Sequence[Photo], options: Options
) -> dict[str, Any]:
    """The tagger against human words on photos that it never saw, beside the words' frequencies in `training`."""
    shown = [photos[index] for index in _with_words(photos, vocabulary)]
    if not shown:
        return _no_words(options)
    frequency = targets(training or shown, vocabulary.tags).mean(0).expand(len(shown), -1)
    found = _label_rows({"tag frequency": frequency, "tagger": predict(tagger, shown)}, shown, vocabulary, options)
    return found | {"frequencies_of": "training photos" if training else "the same photos (kind to the baseline)"}


def degraded_labels(looks: Looks, vocabulary: Vocabulary, photos: Sequence[Photo], options: Options) -> dict[str, Any]:
    """Tagger and DAPE on the degraded `photos` that they looked at, against human words."""
    with_words = _with_words(photos, vocabulary)
    if not with_words:
        return _no_words(options)
    rows = [repeat * len(photos) + index for repeat in range(options.repeats) for index in with_words]
    scores = {name: output.logits_BN[rows] for name, output in looks.degraded.items()}
    return _label_rows(scores, [photos[index] for index in with_words], vocabulary, options, repeats=options.repeats)


def _with_words(photos: Sequence[Photo], vocabulary: Vocabulary) -> list[int]:
    known = set(vocabulary.tags)
    return [index for index, photo in enumerate(photos) if known.intersection(photo.tags)]


def _no_words(options: Options) -> dict[str, Any]:
    return {"absent": f"no photo of {options.photos} carries a word that the tagger knows"}


def _label_rows(
    scores: dict[str, Tensor], shown: Sequence[Photo], vocabulary: Vocabulary, options: Options, *, repeats: int = 1
) -> dict[str, Any]:
    """Scores (repeats · photos, words) against the words of the photos shown."""
    positive = targets(shown, vocabulary.tags).bool()
    telling = positive.sum(0) >= min(options.min_photos, len(shown))
    if not telling.any():
        return {"absent": f"no word is on {options.min_photos} of {len(shown)} photos"}
    weights = resamples(len(shown), options.resamples, seeded(options.seed, Stream.DAPE_INTERVAL, 1)).repeat(1, repeats)
    return {
        "photos": len(shown),
        "tags": int(telling.sum()),
        "words_per_photo": positive.sum(1).float().mean().item(),
        "note": "a word that is not written down counts as absent although it is unknown",
        "rows": precision_rows(scores, positive.repeat(repeats, 1), telling, weights),
    }


_COLUMNS = (
    Column(key="map_tags", title="mAP over tags, % ↑"),
    Column(key="map_photos", title="mAP over photos, % ↑"),
    Column(key="soft_prompt_mse", title="soft prompt MSE ↓", digits=4),
)


def table(report: dict[str, Any]) -> str:
    """All tables as Markdown."""
    sections = (
        section("degraded", report["robustness"], _COLUMNS),
        section("human words", report["labels"], _COLUMNS[:2]),
        section("degraded, human words", report["degraded_labels"], _COLUMNS[:2]),
    )
    return "\n".join(sections)


def section(title: str, part: dict[str, Any], columns: Sequence[Column]) -> str:
    if "absent" in part:
        return f"{title}: absent, {part['absent']}\n"
    rows = {name: {key: _text(value) for key, value in row.items()} for name, row in part["rows"].items()}
    return markdown(f"{title}: {part['photos']} photos, {part['tags']} tags", rows, columns)


def _text(value: Any) -> Any:
    return Estimate(**value).text(1) if isinstance(value, dict) else value


def command(options: Options) -> None:
    """Measure, and show the tables."""
    show(table(evaluate(options)))
