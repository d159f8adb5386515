"""`python -m trainer.evaluate sets`: a model upscales whole test sets; figures, tables and pages of every one.

A set is a folder: pairs (`HR` and `LR` in it), originals (degraded first, as in training) or photos without original.
Results are kept by the hash of the model's weights, so another model, or the same one trained anew, gets its own; the
same command resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seesr_core.cli import main as seesr
from seesr_core.errors import DataError, SettingsError
from seesr_core.install.hashing import sha256
from seesr_core.model_files import NANO, find_model
from seesr_core.runtime.devices import AUTO
from seesr_core.runtime.files import atomic_write

from ...data.photos import opened, read_photos
from ..quality import folders
from ..quality.builds import Backend
from ..quality.compute import BICUBIC, SR
from ..quality.metrics import METRICS, choose_metrics
from ..quality.paper import SETS, Dataset
from ..quality.protocols import HR_SIDE
from ..report.tables import Column, markdown, show, write_json
from .make import LATENT_MULTIPLE, SquareOptions, make_testset

_KEY = 12


@dataclass(kw_only=True, slots=True)
class Options:
    """Upscale test sets by a model and measure the results."""

    out: Path
    """Folder for everything: summary.md, summary.json, and a folder a set."""
    pairs: tuple[Path, ...] = ()
    """Folders with HR and LR, pictures of one name in both."""
    originals: tuple[Path, ...] = ()
    """Folders of clean pictures: the central square of each, up to 512², is degraded as in training."""
    photos: tuple[Path, ...] = ()
    """Folders of photos without originals."""
    model: str = NANO
    """The embedded small model, or a folder of weights."""
    name: str = ""
    """What the model is called in the summary; by default as --model says."""
    niqe_params: Path | None = None
    """NIQE's pristine model, for the project's own NIQE."""
    efficientnet: Path | None = None
    """Weights of EfficientNet-Lite0; see `python -m trainer.evaluate folders --help`."""
    metrics: tuple[str, ...] = ()
    """Only these; see `python -m trainer.evaluate --help`."""
    backend: Backend = "auto"
    """Code that computes the metrics."""
    paper: dict[str, Dataset] = field(default_factory=dict)
    """Which set of the paper a folder's pictures are from, such as realsr_pairs RealSR: its rows stand beside ours."""
    html_pictures: int = 10
    """Most pictures to show on a page, the worst ones; 0 shows all."""
    device: str = AUTO
    """Device that the networks run on."""

    def __post_init__(self) -> None:
        choose_metrics(self.metrics)
        names = [path.name for path in (*self.pairs, *self.originals, *self.photos)]
        if not names:
            raise SettingsError("Nothing to measure: give --pairs, --originals or --photos.")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SettingsError(f"Several sets are called {', '.join(twice)}; rename their folders.")
        unknown = sorted(set(self.paper) - set(names))
        if unknown:
            raise SettingsError(
                f"--paper names {', '.join(unknown)}, which is no set; the sets are {', '.join(names)}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotoSet:
    """One set, ready to be upscaled."""

    name: str
    """Name of the set's folder."""
    lr: Path
    """Folder of photos."""
    hr: Path | None = None
    """Folder of originals."""


def run(options: Options) -> dict[str, Any]:
    """Upscale and measure every set; returns the summary that was written.

    Raises:
        SeeSRError: a set, the model or a setting cannot be used.
    """
    key = model_key(options.model)
    summary: dict[str, Any] = {"model": options.model, "weights": key, "sets": {}}
    for photo_set in _sets(options):
        report = _measure(photo_set, options, key)
        summary["sets"][photo_set.name] = {
            "pictures": report["pictures"],
            "absent": report["absent"],
            "rows": {row: report["rows"][row]["mean"] for row in (BICUBIC, SR)},
        }
    write_json(options.out / "summary.json", summary)
    with atomic_write(options.out / "summary.md") as temporary:
        temporary.write_text(table(summary, options.name or options.model), "utf-8")
    return summary


def model_key(model: str) -> str:
    """A short hash of all weights of a model.

    Raises:
        WeightsError: there is no whole model.
    """
    files = find_model(model)
    parts = [files.base, files.control, files.tagger.weights, *filter(None, [files.tagger.adapter])]
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if path.is_file():
                digest.update(sha256(path).encode())
    return digest.hexdigest()[:_KEY]


def _sets(options: Options) -> Iterator[PhotoSet]:
    for folder in options.pairs:
        yield PhotoSet(name=folder.name, lr=folder / "LR", hr=folder / "HR")
    for folder in options.originals:
        out = options.out / folder.name / "pairs"
        make_testset(SquareOptions(hr=folder, out=out, hr_size=_side(folder)))
        yield PhotoSet(name=folder.name, lr=out / "LR", hr=out / "HR")
    for folder in options.photos:
        yield PhotoSet(name=folder.name, lr=folder)


def _side(folder: Path) -> int:
    """The largest square, up to the paper's 512², that every picture of a folder has."""
    sides = []
    for photo in read_photos(folder):
        with opened(photo) as picture:
            sides.append(min(picture.size))
    side = min(*sides, HR_SIDE) // LATENT_MULTIPLE * LATENT_MULTIPLE
    if not side:
        raise DataError(f"{folder} has a picture with a side below {LATENT_MULTIPLE} pixels; leave it out.")
    return side


def _measure(photo_set: PhotoSet, options: Options, key: str) -> dict[str, Any]:
    """Upscale what has no result yet, then the figures."""
    folder = options.out / photo_set.name / key
    words = ("upscale", photo_set.lr, folder / "SR", "--model", options.model, "--device", options.device)
    if seesr.main([*map(str, words)]):
        raise DataError(f"Not all photos of {photo_set.lr} could be upscaled; the lines above say why.")
    dataset = options.paper.get(photo_set.name)
    return folders.evaluate(
        folders.Options(
            sr=folder / "SR",
            lr=photo_set.lr,
            hr=photo_set.hr,
            json=folder / "report.json",
            csv=folder / "pictures.csv",
            markdown=folder / "report.md",
            html=folder / "report.html",
            html_pictures=options.html_pictures,
            niqe_params=options.niqe_params,
            efficientnet=options.efficientnet,
            metrics=options.metrics,
            backend=options.backend,
            paper=dataset,
            protocol=SETS[dataset].protocol if dataset else None,
            device=options.device,
        )
    )


def table(summary: Mapping[str, Any], name: str) -> str:
    """Means of every set as Markdown: bicubic, then the model."""
    rows: dict[str, dict[str, Any]] = {}
    for title, part in summary["sets"].items():
        for row, figures in part["rows"].items():
            rows[f"{title}, {part['pictures']} pictures, {name if row == SR else row}"] = figures
    columns: list[Column] = [m.column for m in METRICS if any(m.key in figures for figures in rows.values())]
    return markdown(f"weights {summary['weights']}", rows, columns)


def command(options: Options) -> None:
    """Measure, and show the means of every set."""
    show(table(run(options), options.name or options.model))
    show(f"\nPages, tables and figures of every picture: {options.out}/*/*/report.html, .md, .json, pictures.csv\n")
