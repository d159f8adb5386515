"""`python -m trainer.evaluate.ablation`: are the semantics used? Every row leaves one thing out or swaps it.

Input is a folder of pairs, `LR` and `HR` (from `trainer.evaluate.degrade`, or real pairs). Upscaled pictures and losses are
kept in the output folder, so the same command goes on after an interruption and only measures the second time. "Shuffled"
takes the prompt of the photo half the set away, since neighbours in a sorted list are often alike.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError, SettingsError
from seesr_core.models import load_models
from seesr_core.pipeline import Prompts, SeeSRPipeline
from seesr_core.reading import read_photo
from seesr_core.settings import UpscaleSettings
from seesr_core.writing import save_picture

from .. import command
from ..data import seeded
from ..stage1 import fingerprint, read_teacher
from .degrade import spread
from .denoising import TIMESTEPS, Target, denoising_loss, make_target
from .measure import SETTINGS, Figures, Measure, means, read_niqe_model
from .pictures import as_picture, list_pictures, read_picture
from .ranking import mean_estimate, resamples
from .report import QUALITY, Column, markdown, show, write_json
from .rows import FILTERS, FULL, PLAIN_TAGGER, ROWS, WITHOUT_LOSS, Inputs, upscale
from .sheet import write_sheet

log = logging.getLogger(__name__)

RESAMPLES = 1000
_STREAM = 23


@dataclass(kw_only=True, slots=True)
class Options:
    """Upscale pairs in every way and tabulate what changes. The same command again resumes."""

    pairs: Path
    """Folder with LR and HR, pictures of one name in both."""
    out: Path
    """Folder for pictures, losses and `ablation.json`."""
    model: str = "nano"
    """As for `python -m seesr_core upscale`."""
    tagger: Path | None = None
    """The un-tuned tagger (`dape*.safetensors` format) for its row; without it the row is left out."""
    niqe_params: Path | None = None
    """NIQE's pristine model (.npz); without it NIQE is left out."""
    limit: int = 0
    """At most so many pairs, spread over all; 0 takes all."""
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
    """Only these rows; `full` is always there."""
    sheet: Path | None = None
    """Picture to write: the rows side by side."""
    sheet_rows: int = 8
    """At most so many pairs on it."""
    device: str = "auto"
    """As for `upscale`."""
    dtype: str = "auto"
    """As for `upscale`."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.rows) - {*ROWS, *FILTERS})
        if unknown:
            raise SettingsError(f"Unknown rows {', '.join(unknown)}; choose some of {', '.join((*ROWS, *FILTERS))}.")
        if not self.timesteps or not all(0 <= t <= 999 for t in self.timesteps):
            raise SettingsError(f"Timesteps of the loss must lie in 0 … 999, found {list(self.timesteps)}.")

    def given(self) -> dict[str, Any]:
        """The sampling settings that were chosen here."""
        chosen = {name: getattr(self, name) for name in ("steps", "cfg", "start_timestep", "min_size")}
        return {"seed": self.seed, **{name: value for name, value in chosen.items() if value is not None}}


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFile:
    """A pair on disk."""

    name: str
    """Without suffix."""
    lr: Path
    """Photo to upscale."""
    hr: Path
    """Original."""

    def photo(self) -> Image.Image:
        """LR."""
        return read_photo(self.lr).rgb

    def original(self) -> Tensor:
        """HR, uint8 (3, H, W)."""
        return read_picture(self.hr)


def read_pairs(folder: Path, limit: int = 0) -> list[PairFile]:
    """The pairs of a folder, at most `limit`, spread over all.

    Raises:
        DataError: LR or HR is missing or empty, or one has pictures that the other lacks.
    """
    lr, hr = (list_pictures(folder / kind) for kind in ("LR", "HR"))
    if lonely := sorted(lr.keys() ^ hr.keys()):
        raise DataError(f"{folder}: {', '.join(lonely[:5])} is only in one of LR and HR; complete or remove it.")
    return [PairFile(name=name, lr=lr[name], hr=hr[name]) for name in spread(list(lr), limit)]
