"""`python -m trainer.segsr.proof`: does the bridge help? On scenes that nothing was trained on, with 95 % intervals.

Segmentation: a plain segmenter of SegDM's size, SegDM without bridge, with it, and the best that cells can say.
Pictures: SeeSR trained equally long without bridge, with it, and with the true labels in the place of SegDM's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError, SettingsError
from seesr_core.method.schedule import acp_at
from seesr_core.model_files import NANO, GivenFiles
from seesr_core.models import Models, load_models, with_segsr
from seesr_core.pictures.sizes import prepare_size
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.runtime.files import atomic_write
from seesr_core.segsr.labels import VOID, enlarge_labels, label_latent, majority, nearest_labels, paint
from seesr_core.settings import UpscaleSettings

from ..data.order import Stream, seeded
from ..data.photos import Photo, load_photo, load_rgb, read_photos
from ..engine import command
from ..evaluate.pictures import as_picture, as_tensor
from ..evaluate.quality.deep import DeepDistance
from ..evaluate.quality.fidelity import psnr_y
from ..evaluate.report.intervals import Estimate, mean_estimate, resamples
from ..evaluate.report.sheet import write_sheet
from ..evaluate.report.tables import Column, markdown, show, write_json
from .masks import Masks, read_masks

log = logging.getLogger(__name__)

SEGMENTER, APART, JOINT, ORACLE = "segmenter alone", "without bridge", "with bridge", "true labels"
_DIFFERENCE = f"{JOINT} − {APART}"
_FILES: Mapping[str, str] = {SEGMENTER: "segmenter", APART: "apart", JOINT: "joint"}
_AT_ONCE, _SHOWN = 20, 8


@dataclass(kw_only=True, slots=True)
class Options:
    """Compare SegSR with what it is made of."""

    data: Path
    """Folder with HR and LR."""
    masks: Path
    """Their labels."""
    segmenter: Path
    """File of a training with `--mode segmenter`."""
    apart: Path
    """File of a training with `--mode apart`."""
    joint: Path
    """File of a training with `--mode joint`, equally long."""
    json: Path
    """Report to write."""
    model: str = NANO
    """Model that they were trained with."""
    markdown: Path | None = None
    """Table to write."""
    sheet: Path | None = None
    """Picture of some scenes to write."""
    efficientnet: Path | None = None
    """Weights of EfficientNet-Lite0; by default those of its package."""
    limit: int = 0
    """Most scenes; 0 takes all."""
    resamples: int = 1000
    """Bootstrap resamples."""
    seed: int = 0
    """Noise of the first scene."""

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise SettingsError(f"An interval needs at least 2 resamples, not {self.resamples}.")


@dataclass(slots=True)
class Row:
    """What gathers for one way."""

    right: list[Tensor] = field(default_factory=list)
    """Pixels of each class that were found, a scene a row (K,)."""
    either: list[Tensor] = field(default_factory=list)
    """Pixels of each class in truth or answer."""
    figures: dict[str, list[float]] = field(default_factory=dict)
    """Figures of the pictures."""

    def add_labels(self, found: Tensor, true: Tensor, classes: int) -> None:
        """Count one scene; void does not count."""
        known = true != VOID
        pairs = torch.bincount(true[known] * classes + found[known], minlength=classes**2).view(classes, classes)
        self.right.append(pairs.diagonal().double())
        self.either.append((pairs.sum(0) + pairs.sum(1) - pairs.diagonal()).double())

    def miou(self, weights_RN: Tensor) -> Estimate:
        """Mean IoU in percent over the classes that are there."""
        right, either = torch.stack(self.right), torch.stack(self.either)
        one = _miou(right.sum(0, keepdim=True), either.sum(0, keepdim=True))[0]
        weights = weights_RN.double()
        return Estimate.of(one, _miou(weights @ right, weights @ either), least=0, most=100)


def _miou(right_RK: Tensor, either_RK: Tensor) -> Tensor:
    return 100 * torch.where(either_RK > 0, right_RK / either_RK, torch.nan).nanmean(1)


def load(options: Options, path: Path) -> Models:
    """The model with one of the files."""
    return with_segsr(load_models(options.model, device="cpu", dtype="fp32", given=GivenFiles()), path)


@torch.no_grad()
def restore(models: Models, photos: Sequence[Image.Image], seed: int, true: Tensor | None) -> tuple[list[Any], Tensor]:
    """Pictures and labels (B, h, w) of LR photos of one size, as training saw them: no words, no guidance.

    Args:
        models: with SegSR.
        photos: LR.
        seed: of the first photo.
        true: labels (B, H, W) to be told instead of SegDM's.
    """
    pipeline = SeeSRPipeline(models=models)
    settings = pipeline.settings(min_size=0, use_tags=False, added_prompt="", seed=seed)
    prompts = pipeline.read_prompts(photos, settings)
    prepared = pipeline.prepare(photos, settings)
    z_lr = pipeline.encode(prepared, settings)
    joint = pipeline.join(z_lr, prompts.soft_prompt, settings)
    assert joint is not None
    if true is not None:
        told = label_latent(true, len(joint.segsr.classes), *z_lr.shape[2:])
        joint.predict = lambda noisy, acp, image: told
    states = pipeline.encode_text([settings.negative, *pipeline.compose(prompts, settings)])
    latent = pipeline.sample(prepared, z_lr, states, prompts.soft_prompt, settings, None, joint)
    sizes = prepare_size(*photos[0].size, scale=settings.scale, min_size=settings.min_size)
    return pipeline.finish(pipeline.decode(latent, settings), prepared, sizes, settings), joint.labels()


@torch.no_grad()
def answer(models: Models, photos: Sequence[Image.Image]) -> Tensor:
    """Labels (B, h, w) of a plain segmenter."""
    pipeline, segsr = SeeSRPipeline(models=models), models.segsr
    assert segsr is not None
    settings = pipeline.settings(min_size=0)
    prompts = pipeline.read_prompts(photos, settings)
    z_lr = pipeline.encode(pipeline.prepare(photos, settings), settings)
    assert prompts.soft_prompt is not None
    features = segsr.segdm.features(z_lr, prompts.soft_prompt)
    first = UpscaleSettings.for_model(models.defaults).denoised_timesteps()[0]
    level = torch.full((len(z_lr),), acp_at(first))
    noisy = torch.zeros(len(z_lr), segsr.bits, *z_lr.shape[2:])
    return nearest_labels(segsr.segdm(noisy, features, level), len(segsr.classes))


def prove(options: Options) -> dict[str, Any]:
    """Measure; writes and returns the report.

    Raises:
        SeeSRError: data or files that cannot be used, or that do not belong together.
    """
    photos = read_photos(options.data)[: options.limit or None]
    masks = read_masks(options.masks)
    masks.check(photos)
    if any(photo.lr is None for photo in photos):
        raise DataError(f"{options.data} should have folders HR and LR with scenes of the same names.")
    deep = DeepDistance.load(options.efficientnet)
    models = {name: load(options, getattr(options, kind)) for name, kind in _FILES.items()}
    rows = {name: Row() for name in (*_FILES, ORACLE)}
    shown: list[tuple[str, dict[str, Image.Image]]] = []
    for first in range(0, len(photos), _AT_ONCE):
        part = photos[first : first + _AT_ONCE]
        shown += _measure(part, masks, models, rows, deep, options.seed + first)
        log.info("%d of %d scenes", first + len(part), len(photos))
    report = summary(rows, options)
    write_json(options.json, report)
    if options.markdown is not None:
        with atomic_write(options.markdown) as temporary:
            temporary.write_text(table(report), "utf-8")
    if options.sheet is not None:
        write_sheet(options.sheet, shown[:_SHOWN])
    return report


def _measure(
    photos: Sequence[Photo],
    masks: Masks,
    models: Mapping[str, Models],
    rows: Mapping[str, Row],
    deep: DeepDistance,
    seed: int,
) -> list[tuple[str, dict[str, Image.Image]]]:
    """Count some scenes; returns their pictures."""
    hr = [load_photo(photo) for photo in photos]
    lr = [as_picture(load_rgb(photo.lr)) for photo in photos if photo.lr is not None]
    true = torch.stack([masks.get(photo, image.shape[1:]).long() for photo, image in zip(photos, hr, strict=True)])
    answers = {SEGMENTER: answer(models[SEGMENTER], lr)}
    made = {}
    for name in (APART, JOINT):
        made[name], answers[name] = restore(models[name], lr, seed, None)
    made[ORACLE], _ = restore(models[JOINT], lr, seed, true)
    answers[ORACLE] = majority(true, *answers[JOINT].shape[1:])
    for name, found in answers.items():
        fitted = enlarge_labels(torch.where(found == VOID, 0, found), *true.shape[1:])
        for one, other in zip(fitted, true, strict=True):
            rows[name].add_labels(one, other, len(masks.classes))
    for name, pictures in made.items():
        for picture, original in zip(pictures, hr, strict=True):
            figures = {"psnr_y": psnr_y(as_tensor(picture), original), "deep": deep(as_tensor(picture), original)}
            for key, value in figures.items():
                rows[name].figures.setdefault(key, []).append(value)
    return [_shown(i, photos[i], lr, hr, true, answers, made, masks) for i in range(len(photos))]


def _shown(
    i: int,
    photo: Photo,
    lr: Sequence[Image.Image],
    hr: Sequence[Tensor],
    true: Tensor,
    answers: Mapping[str, Tensor],
    made: Mapping[str, Sequence[Image.Image]],
    masks: Masks,
) -> tuple[str, dict[str, Image.Image]]:
    size = (hr[i].shape[2], hr[i].shape[1])
    palette = list(masks.classes.palette)
    painted = {f"labels {name}": as_picture(paint(found[i : i + 1], palette)[0]) for name, found in answers.items()}
    pictures = {"LR": lr[i], **{f"SR {name}": rows[i] for name, rows in made.items()}, "HR": as_picture(hr[i])}
    told = {**pictures, **painted, "labels": as_picture(paint(true[i : i + 1], palette)[0])}
    return photo.path.stem, {name: picture.resize(size, Image.Resampling.NEAREST) for name, picture in told.items()}


def summary(rows: Mapping[str, Row], options: Options) -> dict[str, Any]:
    """Figures of every row with their intervals."""
    count = len(rows[JOINT].right)
    weights = resamples(count, options.resamples, seeded(Stream.SEGSR_INTERVAL))
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        figures = {key: mean_estimate(torch.tensor(values), weights) for key, values in row.figures.items()}
        found[name] = {"miou": row.miou(weights), **figures}
    found[_DIFFERENCE] = {
        "miou": _miou_difference(rows[JOINT], rows[APART], weights),
        **{
            key: mean_estimate(torch.tensor(values) - torch.tensor(rows[APART].figures[key]), weights)
            for key, values in rows[JOINT].figures.items()
        },
    }
    plain = {name: {key: value._asdict() for key, value in row.items()} for name, row in found.items()}
    files = {name: str(getattr(options, kind)) for name, kind in _FILES.items()}
    return {"scenes": count, "seed": options.seed, "files": files, "rows": plain}


def _miou_difference(one: Row, other: Row, weights_RN: Tensor) -> Estimate:
    weights = weights_RN.double()
    means, resampled = [], []
    for row in (one, other):
        right, either = torch.stack(row.right), torch.stack(row.either)
        means.append(_miou(right.sum(0, keepdim=True), either.sum(0, keepdim=True))[0])
        resampled.append(_miou(weights @ right, weights @ either))
    return Estimate.of(means[0] - means[1], resampled[0] - resampled[1])


_COLUMNS = (("miou", "mIoU, % ↑", 1), ("psnr_y", "PSNR-Y ↑", 2), ("deep", "deep features ↓", 4))


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    columns = [Column(key=key, title=title) for key, title, _ in _COLUMNS]
    texts = {
        name: {
            key: Estimate(**row[key]).text(digits, signed=name == _DIFFERENCE)
            for key, _, digits in _COLUMNS
            if key in row
        }
        for name, row in report["rows"].items()
    }
    return markdown(f"{report['scenes']} scenes", texts, columns)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: show(table(prove(tyro.cli(Options, args=argv, prog="python -m trainer.segsr.proof")))))


if __name__ == "__main__":
    sys.exit(main())
