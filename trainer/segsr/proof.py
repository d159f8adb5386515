"""`python -m trainer.segsr.proof`: does the bridge help? On scenes that nothing was trained on, with 95 % intervals.

Segmentation: a plain segmenter of SegDM's size, SegDM without bridge, with it, and the best that cells can say; then
SegDM with the bridge's side of the picture silent, and told the true picture, which shows what that side is worth.
Pictures: SeeSR trained equally long without bridge, with it, and with the true labels in the place of SegDM's.
Of several trainings, each from a seed of its own, a row has the mean; intervals are over scenes and trainings.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from seesr_core.segsr.joint import JointRun
from seesr_core.segsr.labels import VOID, enlarge_labels, label_latent, majority, nearest_labels, paint
from seesr_core.settings import UpscaleSettings

from ..data.fingerprints import digest
from ..data.photos import Photo, load_photo, load_rgb, read_photos
from ..engine import command
from ..evaluate.pictures import as_picture, as_tensor
from ..evaluate.quality.deep import DeepDistance
from ..evaluate.quality.fidelity import psnr_y
from ..evaluate.report.intervals import Estimate
from ..evaluate.report.sheet import write_sheet
from ..evaluate.report.tables import Column, markdown, show, write_json
from .figures import MIOU, Drawn, Row, Rows, differences, estimates, read_rows, sampled
from .masks import Masks, read_masks

log = logging.getLogger(__name__)

SEGMENTER, APART, JOINT, ORACLE = "segmenter alone", "without bridge", "with bridge", "true labels"
SILENT, TRUE_PICTURE = "with bridge, labels told nothing", "with bridge, labels told the true picture"
_OF_JOINT = (SILENT, TRUE_PICTURE, ORACLE)
_LESS_APART = f" − {APART}"
_AT_ONCE, _SHOWN = 20, 8


@dataclass(kw_only=True, slots=True)
class Options:
    """Compare SegSR with what it is made of."""

    data: Path
    """Folder with HR and LR."""
    masks: Path
    """Their labels."""
    apart: tuple[Path, ...]
    """Files of trainings with `--mode apart`, one a seed."""
    joint: tuple[Path, ...]
    """Files of trainings with `--mode joint`, equally long and from the same seeds."""
    json: Path
    """Report to write."""
    segmenter: tuple[Path, ...] = ()
    """Files of trainings with `--mode segmenter`; the row is left out without."""
    more: tuple[tuple[str, Path], ...] = ()
    """Other trainings with `--mode joint` and the same seeds, as NAME FILE NAME FILE …; those of one name are a row."""
    model: str = NANO
    """Model that they were trained with."""
    markdown: Path | None = None
    """Table to write."""
    sheet: Path | None = None
    """Picture of some scenes to write, by the first training of each row."""
    efficientnet: Path | None = None
    """Weights of EfficientNet-Lite0; by default those of its package."""
    known: tuple[Path, ...] = ()
    """Reports of earlier runs on the same scenes, whose rows are taken over for files that they measured."""
    limit: int = 0
    """Most scenes; 0 takes all."""
    resamples: int = 1000
    """Bootstrap resamples."""
    seed: int = 0
    """Noise of the first scene."""

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise SettingsError(f"An interval needs at least 2 resamples, not {self.resamples}.")
        uneven = {name: len(files) for name, files in self.files().items() if len(files) != len(self.apart)}
        if uneven:
            raise SettingsError(
                f"Rows are compared training by training: expected {len(self.apart)} files of each, as of --apart, "
                f"found {uneven}."
            )

    def files(self) -> dict[str, list[Path]]:
        """The trainings of every row."""
        found = {SEGMENTER: [*self.segmenter], APART: [*self.apart], JOINT: [*self.joint]}
        for name, path in self.more:
            found.setdefault(name, []).append(path)
        return {name: paths for name, paths in found.items() if paths}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenes:
    """Some scenes of one size, and what no training changes of them."""

    names: list[str]
    """Names of the photos, without suffix."""
    lr: list[Image.Image]
    """LR photos."""
    hr: list[Tensor]
    """Originals, uint8 (3, H, W)."""
    true: Tensor
    """Labels (B, H, W)."""
    settings: UpscaleSettings
    """As training saw them: no words, no guidance."""
    prepared: Tensor
    """Enlarged LR, uint8 (B, 3, H, W)."""
    z_lr: Tensor
    """Scaled latents of the enlarged LR (B, C, h, w)."""
    z_hr: Tensor
    """Scaled latents of the originals (B, C, h, w)."""
    states: Tensor
    """Text states (1 + B, L, D)."""
    soft_prompt: Tensor
    """DAPE's tokens (B, L, D)."""

    @classmethod
    @torch.no_grad()
    def read(cls, photos: Sequence[Photo], masks: Masks, models: Models, seed: int) -> Scenes:
        """Read them, and look at them by the frozen networks."""
        hr = [load_photo(photo) for photo in photos]
        lr = [as_picture(load_rgb(photo.lr)) for photo in photos if photo.lr is not None]
        pipeline = SeeSRPipeline(models=models)
        settings = pipeline.settings(min_size=0, use_tags=False, added_prompt="", seed=seed)
        prompts = pipeline.read_prompts(lr, settings)
        prepared = pipeline.prepare(lr, settings)
        assert prompts.soft_prompt is not None
        return cls(
            names=[photo.path.stem for photo in photos],
            lr=lr,
            hr=hr,
            true=torch.stack([masks.get(p, image.shape[1:]).long() for p, image in zip(photos, hr, strict=True)]),
            settings=settings,
            prepared=prepared,
            z_lr=pipeline.encode(prepared, settings),
            z_hr=pipeline.encode(torch.stack(hr), settings),
            states=pipeline.encode_text([settings.negative, *pipeline.compose(prompts, settings)]),
            soft_prompt=prompts.soft_prompt,
        )

    def joined(self, models: Models) -> JointRun:
        """The segmentation's side of a run."""
        joint = SeeSRPipeline(models=models).join(self.z_lr, self.soft_prompt, self.settings)
        assert joint is not None
        return joint


@torch.no_grad()
def restore(models: Models, scenes: Scenes, true: Tensor | None = None) -> tuple[list[Image.Image], Tensor]:
    """Pictures and labels (B, h, w) of both processes together; `true` labels (B, H, W) are told instead of SegDM's."""
    pipeline, settings, joint = SeeSRPipeline(models=models), scenes.settings, scenes.joined(models)
    if true is not None:
        told = label_latent(true, joint.segsr.codes, *scenes.z_lr.shape[2:])
        joint.predict = lambda noisy, acp, image: told
    given = (scenes.prepared, scenes.z_lr, scenes.states, scenes.soft_prompt)
    latent = pipeline.sample(*given, settings, None, joint)
    sizes = prepare_size(*scenes.lr[0].size, scale=settings.scale, min_size=settings.min_size)
    return pipeline.finish(pipeline.decode(latent, settings), scenes.prepared, sizes, settings), joint.labels()


@torch.no_grad()
def believe(models: Models, scenes: Scenes, z0: Tensor | None = None) -> Tensor:
    """Labels (B, h, w) of SegDM alone on its way, told clean latents z0 after every step, or nothing."""
    joint = scenes.joined(models)
    for t in scenes.settings.denoised_timesteps():
        joint.at(acp_at(t))
        if z0 is not None:
            joint.saw(acp_at(t), z0)
    return joint.labels()


@torch.no_grad()
def answer(models: Models, scenes: Scenes) -> Tensor:
    """Labels (B, h, w) of a plain segmenter."""
    segsr = models.segsr
    assert segsr is not None
    features = segsr.segdm.features(scenes.z_lr, scenes.soft_prompt)
    level = torch.full((len(scenes.z_lr),), acp_at(scenes.settings.denoised_timesteps()[0]))
    noisy = torch.zeros(len(scenes.z_lr), segsr.bits, *scenes.z_lr.shape[2:])
    return nearest_labels(segsr.segdm(noisy, features, level), segsr.codes)


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
    measured = _measured(photos, masks, options)
    rows: Rows = {}
    for earlier in options.known:
        for name, found in read_rows(earlier, measured).items():
            rows.setdefault(name, {}).update(found)
    trainings = [
        {
            name: (_key(files[number]), load(options.model, files[number]))
            for name, files in options.files().items()
            if _key(files[number]) not in rows.get(name, {})
        }
        for number in range(len(options.apart))
    ]
    trainings = [missing for missing in trainings if missing]
    shown: list[tuple[str, dict[str, Image.Image]]] = []
    for first in range(0, len(photos) if trainings else 0, _AT_ONCE):
        part = photos[first : first + _AT_ONCE]
        scenes = Scenes.read(part, masks, next(iter(trainings[0].values()))[1], options.seed + first)
        results = [Results.of(models, scenes) for models in trainings]
        for result in results:
            result.count(scenes, rows, len(masks.classes), deep)
        shown += results[0].shown(scenes, list(masks.classes.palette)) if len(shown) < _SHOWN else []
        log.info("%d of %d scenes", first + len(part), len(photos))
    counts = {name: {key: row.plain() for key, row in of_name.items()} for name, of_name in rows.items()}
    report = summary(rows, options)
    write_json(options.json, {**report, "measured": measured, "counts": counts})
    if options.markdown is not None:
        with atomic_write(options.markdown) as temporary:
            temporary.write_text(table(report), "utf-8")
    if options.sheet is not None and shown:
        write_sheet(options.sheet, shown[:_SHOWN])
    return report


def load(model: str, path: Path) -> Models:
    """The model with one of the files."""
    return with_segsr(load_models(model, device="cpu", dtype="fp32", given=GivenFiles()), path)


def _measured(photos: Sequence[Photo], masks: Masks, options: Options) -> str:
    """A short text that differs when the scenes do, or what is done with them."""
    files = (path for p in photos for path in (p.path, p.lr, masks.files[p.path.stem]) if path is not None)
    return digest([f"{masks.fingerprint()} {options.seed} {options.model}".encode(), *(f.read_bytes() for f in files)])


def _key(path: Path) -> str:
    return digest([path.read_bytes()])


@dataclass(slots=True)
class Results:
    """What the trainings of one seed make of some scenes."""

    keys: dict[str, str]
    """Hash of the training's file by row."""
    answers: dict[str, Tensor]
    """Labels (B, h, w) by row."""
    pictures: dict[str, list[Image.Image]]
    """Pictures by row."""

    @classmethod
    def of(cls, models: Mapping[str, tuple[str, Models]], scenes: Scenes) -> Results:
        """Run them all, given with their hashes."""
        made = cls({name: key for name, (key, _) in models.items()}, {}, {})
        for name, (_, model) in models.items():
            if name == SEGMENTER:
                made.answers[name] = answer(model, scenes)
            else:
                made.pictures[name], made.answers[name] = restore(model, scenes)
        if JOINT in models:
            key, model = models[JOINT]
            made.keys |= dict.fromkeys(_OF_JOINT, key)
            made.answers[SILENT] = believe(model, scenes)
            made.answers[TRUE_PICTURE] = believe(model, scenes, scenes.z_hr)
            made.pictures[ORACLE], _ = restore(model, scenes, scenes.true)
            made.answers[ORACLE] = majority(scenes.true, *scenes.z_lr.shape[2:])
        return made

    def count(self, scenes: Scenes, rows: Rows, classes: int, deep: DeepDistance) -> None:
        """Add labels and pictures to the rows of the trainings."""
        for name, found in self.answers.items():
            row = rows.setdefault(name, {}).setdefault(self.keys[name], Row())
            fitted = enlarge_labels(torch.where(found == VOID, 0, found), *scenes.true.shape[1:])
            for one, other in zip(fitted, scenes.true, strict=True):
                row.add_labels(one, other, classes)
        for name, pictures in self.pictures.items():
            gathered = rows[name][self.keys[name]].figures
            for picture, original in zip(pictures, scenes.hr, strict=True):
                gathered.setdefault("psnr_y", []).append(psnr_y(as_tensor(picture), original))
                gathered.setdefault("deep", []).append(deep(as_tensor(picture), original))

    def shown(self, scenes: Scenes, palette: list[tuple[int, int, int]]) -> list[tuple[str, dict[str, Image.Image]]]:
        """Pictures and labels of each scene beside each other."""
        return [(name, self._shown(i, scenes, palette)) for i, name in enumerate(scenes.names)]

    def _shown(self, i: int, scenes: Scenes, palette: list[tuple[int, int, int]]) -> dict[str, Image.Image]:
        labels = {f"labels {name}": found[i : i + 1] for name, found in self.answers.items()}
        painted = {
            name: as_picture(paint(found, palette)[0])
            for name, found in {**labels, "labels": scenes.true[i : i + 1]}.items()
        }
        made = {f"SR {name}": pictures[i] for name, pictures in self.pictures.items()}
        told = {"LR": scenes.lr[i], **made, "HR": as_picture(scenes.hr[i]), **painted}
        size = (scenes.hr[i].shape[2], scenes.hr[i].shape[1])
        return {name: picture.resize(size, Image.Resampling.NEAREST) for name, picture in told.items()}


def summary(rows: Rows, options: Options) -> dict[str, Any]:
    """Figures of every row with their intervals."""
    files = options.files()
    of_row = {**files, **dict.fromkeys(_OF_JOINT, files[JOINT])}
    chosen = {name: [rows[name][_key(path)] for path in paths] for name, paths in of_row.items()}
    drawn = Drawn.of(len(chosen[JOINT][0].right), len(options.apart), options.resamples)
    figures = {name: sampled(row, drawn) for name, row in chosen.items()}
    found = {name: estimates(row) for name, row in figures.items()}
    for name in files:
        if name not in (SEGMENTER, APART):
            found[name + _LESS_APART] = differences(figures[name], figures[APART])
    plain = {name: {key: value._asdict() for key, value in row.items()} for name, row in found.items()}
    told = {name: [str(path) for path in paths] for name, paths in files.items()}
    scenes, trainings = drawn.scenes_RN.shape[1], drawn.trainings_RS.shape[1]
    return {"scenes": scenes, "trainings": trainings, "seed": options.seed, "files": told, "rows": plain}


_COLUMNS = ((MIOU, "mIoU, % ↑", 1), ("psnr_y", "PSNR-Y ↑", 2), ("deep", "deep features ↓", 4))


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    columns = [Column(key=key, title=title) for key, title, _ in _COLUMNS]
    texts = {
        name: {
            key: Estimate(**row[key]).text(digits, signed=name.endswith(_LESS_APART))
            for key, _, digits in _COLUMNS
            if key in row
        }
        for name, row in report["rows"].items()
    }
    return markdown(f"{report['scenes']} scenes, {report['trainings']} trainings", texts, columns)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: show(table(prove(tyro.cli(Options, args=argv, prog="python -m trainer.segsr.proof")))))


if __name__ == "__main__":
    sys.exit(main())
