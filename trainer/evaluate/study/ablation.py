"""`python -m trainer.evaluate.ablation`: are the semantics used? Every row leaves one thing out or swaps it.

Input is a folder of pairs, `LR` and `HR` (from `trainer.evaluate.degrade`, or real pairs). Upscaled pictures and losses
are kept in the output folder, so the same command goes on after an interruption and only measures the second time.
"Shuffled" takes the prompt of the photo half the set away, since neighbours in a sorted list are often alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image

from seesr_core.errors import SettingsError
from seesr_core.models import load_models
from seesr_core.pictures.sizes import resize
from seesr_core.pipeline import SeeSRPipeline

from ...data.order import Stream, seeded
from ...stage1.networks import read_teacher
from ..pictures import as_picture, as_tensor, spread
from ..quality.deep import DeepDistance
from ..quality.fidelity import psnr_y
from ..quality.measure import SETTINGS, Figures, Measure, means, read_niqe_model
from ..quality.metrics import DEEP
from ..report.intervals import Estimate, mean_estimate, resamples
from ..report.photo_pages import named_folders
from ..report.sheet import write_sheet
from ..report.tables import QUALITY, Column, markdown, show, write_json
from .denoising import TIMESTEPS
from .rows import CODED, FILTERS, FULL, PLAIN_TAGGER, ROWS
from .study import Study, read_pairs

RESAMPLES = 1000
_COLUMNS = (
    *QUALITY,
    Column(key="psnr_difference", title="PSNR-Y − full, dB [95 %]"),
    Column(key="psnr_lr", title="LR-PSNR ↑"),
    Column(key="change", title="change of the output"),
    Column(key="latent_error", title="latent error ↓"),
    Column(key="loss", title="denoising loss ↓", digits=4),
    Column(key="loss_difference", title="loss − full, % of full [95 %]"),
)


@dataclass(kw_only=True, slots=True)
class Options:
    """Upscale pairs in every way and tabulate what changes. The same command again resumes."""

    pairs: Path
    """Folder with LR and HR, pictures of one name in both."""
    out: Path
    """Folder for pictures, losses and `ablation.json`."""
    model: str = "nano"
    """Model, as `python -m seesr_core upscale` takes it."""
    tagger: Path | None = None
    """The un-tuned tagger (`dape*.safetensors` format) for its row; without it the row is left out."""
    niqe_params: Path | None = None
    """NIQE's pristine model (.npz); without it NIQE is left out."""
    efficientnet: Path | None = None
    """Weights of EfficientNet-Lite0 (.pth); by default those of its package, without which its distance is left out."""
    beside: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A folder of other results of the same pairs as NAME=DIR, as a row of its own; may be given several times."""
    limit: int = 0
    """Most pairs to take, spread over all; 0 takes all."""
    seed: int = 0
    """Noise of the sampling and of the denoising loss."""
    steps: int | None = None
    """Sampling steps; by default the model's own."""
    cfg: float | None = None
    """Guidance scale; by default the model's own."""
    start_timestep: int | None = None
    """Start of the sampling; by default the model's own."""
    min_size: int | None = None
    """Smaller results are computed larger; 0 turns that off, by default the model's own."""
    timesteps: tuple[int, ...] = TIMESTEPS
    """Timesteps of the denoising loss."""
    rows: tuple[str, ...] = ()
    """Rows to compute (all if none is named); `full` is always there."""
    sheet: Path | None = None
    """Picture to write: the rows side by side."""
    sheet_rows: int = 8
    """Most pairs to show on the sheet."""
    device: str = "auto"
    """Device, as `python -m seesr_core upscale` takes it."""
    dtype: str = "auto"
    """Precision, as `python -m seesr_core upscale` takes it."""

    def __post_init__(self) -> None:
        known = (*ROWS, *CODED, *FILTERS, *named_folders(self.beside))
        if unknown := sorted(set(self.rows) - set(known)):
            raise SettingsError(f"Unknown rows {', '.join(unknown)}; choose some of {', '.join(known)}.")
        if len(set(known)) < len(known):
            raise SettingsError("--beside uses the name of a row; choose another.")
        if not self.timesteps or not all(0 <= t <= 999 for t in self.timesteps):
            raise SettingsError(f"Timesteps of the loss must lie in 0 … 999, found {list(self.timesteps)}.")

    def given(self) -> dict[str, Any]:
        """The sampling settings that were chosen here."""
        chosen = {name: getattr(self, name) for name in ("steps", "cfg", "start_timestep", "min_size")}
        return {"seed": self.seed, **{name: value for name, value in chosen.items() if value is not None}}


def run(options: Options) -> dict[str, Any]:
    """Make what is missing, measure all, write `ablation.json` (and the sheet); returns the report.

    Raises:
        SeeSRError: files that cannot be used, or a folder with another study.
    """
    study = open_study(options)
    every = (*ROWS, *CODED, *FILTERS, *study.beside)
    rows = [row for row in every if row == FULL or not options.rows or row in options.rows]
    if study.plain is None:
        rows = [row for row in rows if row != PLAIN_TAGGER]
    study.fill(rows)
    measure, absent = _measure(options)
    report = {
        "settings": {**SETTINGS, **_SETTINGS, **study.identity()},
        "pairs": len(study.pairs),
        "absent": absent,
        "rows": summarize({row: figures(study, row, measure) for row in rows}, options.seed),
    }
    write_json(options.out / "ablation.json", report)
    if options.sheet is not None:
        write_sheet(options.sheet, list(_sheet_rows(study, rows, options.sheet_rows)))
    return report


_SETTINGS = {
    "psnr_lr": "PSNR-Y of the picture, brought to LR's size by bicubic, to LR: how well it keeps to the photo",
    "change": "mean absolute difference to the row 'full', levels of 8 bits over all channels",
    "loss": "mean squared error of the predicted noise on HR latents, the same noise in every row, no guidance",
    "latent_error": "squared error of the sampled latent to HR's, divided by that of LR's own latent; below 1: nearer",
    "shuffled": "from the photo half the set away, brought to this one's size",
    "difference": "mean over the pictures of row - full, 95 % bootstrap interval",
}


def open_study(options: Options) -> Study:
    """Load model, tagger and pairs.

    Raises:
        SeeSRError: one of them cannot be used.
    """
    models = load_models(options.model, device=options.device, dtype=options.dtype)
    pipeline = SeeSRPipeline(models=models)
    plain = None
    if options.tagger is not None:
        tagger, vocabulary = read_teacher(options.tagger)
        plain = SeeSRPipeline(models=replace(models, dape=tagger.eval().to(models.device), vocabulary=vocabulary))
    return Study(
        pipeline=pipeline,
        plain=plain,
        settings=pipeline.settings(**options.given()),
        pairs=read_pairs(options.pairs, options.limit),
        out=options.out,
        timesteps=options.timesteps,
        beside=named_folders(options.beside),
    )


def _measure(options: Options) -> tuple[Measure, dict[str, str]]:
    """What judges the pictures, and what is missing and why."""
    absent = {} if options.tagger else {PLAIN_TAGGER: "no un-tuned tagger (--tagger)"}
    niqe_model, deep = None, DeepDistance.find(options.efficientnet)
    if options.niqe_params:
        niqe_model = read_niqe_model(options.niqe_params)
    else:
        absent["niqe"] = "no pristine model (--niqe-params)"
    if deep is None:
        absent[DEEP] = "no weights (--efficientnet, or their package)"
    return Measure(niqe_model=niqe_model, deep=deep), absent


def figures(study: Study, row: str, measure: Measure) -> dict[str, Figures]:
    """Every figure of a row, by picture."""
    found: dict[str, Figures] = {}
    for pair in study.pairs:
        picture, full = study.picture(row, pair), study.picture(FULL, pair)
        change = (picture.float() - full.float()).abs().mean().item()
        kept = psnr_y(as_tensor(resize(as_picture(picture), pair.photo().size)), as_tensor(pair.photo()))
        found[pair.name] = {**measure(picture, pair.original()), "psnr_lr": kept, "change": change}
        more = {"loss": study.loss(row, pair), "latent_error": study.latent_error(row, pair)}
        found[pair.name] |= {key: value for key, value in more.items() if value is not None}
    return found


def summarize(rows: Mapping[str, Mapping[str, Figures]], seed: int) -> dict[str, Any]:
    """Means, paired differences to `full`, and the figures themselves."""
    summary: dict[str, Any] = {}
    for row, pictures in rows.items():
        mean, count = means(pictures.values())
        differences = {} if row == FULL else _differences(pictures, rows[FULL], seed)
        summary[row] = {"mean": mean, "count": count, "difference": differences, "pictures": pictures}
    return summary


def _differences(
    pictures: Mapping[str, Figures], full: Mapping[str, Figures], seed: int
) -> dict[str, dict[str, float]]:
    """Row − full with its interval, for every figure that both have."""
    found: dict[str, dict[str, float]] = {}
    for key in ("psnr_y", "ssim_y", "niqe", DEEP, "latent_error", "loss"):
        pairs = [(own[key], full[name][key]) for name, own in pictures.items() if key in own and key in full[name]]
        if pairs:
            values = torch.tensor(pairs, dtype=torch.float64)
            weights = resamples(len(pairs), RESAMPLES, seeded(seed, Stream.ABLATION_INTERVAL))
            found[key] = mean_estimate(values[:, 0] - values[:, 1], weights)._asdict()
    return found


def _sheet_rows(study: Study, rows: Sequence[str], count: int) -> Iterator[tuple[str, dict[str, Image.Image]]]:
    for pair in spread(study.pairs, count):
        versions = {row: as_picture(study.picture(row, pair)) for row in rows}
        yield pair.name, versions | {"HR": as_picture(pair.original())}


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    rows = {}
    for row, summary in report["rows"].items():
        differences, text = summary["difference"], {}
        if "psnr_y" in differences:
            text["psnr_difference"] = Estimate(**differences["psnr_y"]).text(2, signed=True)
        if "loss" in differences:
            text["loss_difference"] = _percent(differences["loss"], report["rows"][FULL])
        rows[row.replace("_", " ")] = {**summary["mean"], **text}
    absent = "".join(f"\n{name} absent: {reason}." for name, reason in report["absent"].items())
    return markdown(f"{report['pairs']} pairs", rows, _COLUMNS) + absent + "\n" * bool(absent)


def _percent(difference: Mapping[str, float], full: Mapping[str, Any]) -> str:
    """A difference of losses in percent of the mean loss of `full`."""
    share = {key: 100 * value / full["mean"]["loss"] for key, value in difference.items()}
    return Estimate(**share).text(2, signed=True)


def command(options: Options) -> None:
    """Make what is missing, measure, and show the table."""
    show(table(run(options)))
