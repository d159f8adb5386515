"""What an ablation has to compute, kept on disk picture by picture so that it can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError
from seesr_core.formats.schema import MalformedError, read, read_json
from seesr_core.pictures.reading import read_photo
from seesr_core.pictures.sizes import resize
from seesr_core.pictures.writing import save_picture
from seesr_core.pipeline import Prompts, SeeSRPipeline
from seesr_core.settings import UpscaleSettings

from ...data.fingerprints import digest, fingerprint
from ..pictures import as_picture, as_tensor, enlarge, list_pictures, read_picture, spread
from ..report.tables import write_json
from .denoising import condition_of, denoising_loss, make_target
from .rows import CODED, FILTERS, ROWS, WITHOUT_LOSS, Inputs, finished, sampled

_NETWORKS = ("unet", "controlnet", "vae", "text_encoder", "dape")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairFile:
    """A pair on disk."""

    name: str
    """Name of the picture without suffix."""
    lr: Path
    """File of the photo to upscale."""
    hr: Path
    """File of the original."""

    def photo(self) -> Image.Image:
        """The photo to upscale (LR)."""
        return read_photo(self.lr).rgb

    def original(self) -> Tensor:
        """The original (HR), uint8 (3, H, W)."""
        return read_picture(self.hr)


def read_pairs(folder: Path, limit: int = 0) -> list[PairFile]:
    """The pairs of a folder with LR and HR in it, at most `limit`, spread over all.

    Raises:
        DataError: LR or HR is missing or empty, or one has pictures that the other lacks.
    """
    lr, hr = (list_pictures(folder / kind) for kind in ("LR", "HR"))
    if lonely := sorted(lr.keys() ^ hr.keys()):
        raise DataError(f"{folder}: {', '.join(lonely[:5])} is only in one of LR and HR; complete or remove it.")
    return [PairFile(name=name, lr=lr[name], hr=hr[name]) for name in spread(list(lr), limit)]


@dataclass(kw_only=True, slots=True)
class Study:
    """Pictures and losses of every row and pair, in `out`."""

    pipeline: SeeSRPipeline
    """The whole model."""
    plain: SeeSRPipeline | None
    """The model with the un-tuned tagger; None if there is none."""
    settings: UpscaleSettings
    """Settings of every row, unless the row changes them."""
    pairs: list[PairFile]
    """Pairs of the study: at least two, since prompts are swapped among them."""
    out: Path
    """Folder in which everything is kept."""
    timesteps: Sequence[int]
    """Timesteps of the denoising loss; its noise derives from the seed in `settings`."""
    beside: Mapping[str, Path] = field(default_factory=dict)
    """Folders of other results, each a row of its name."""
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    """Denoising losses by row and pair, as far as computed."""
    latents: dict[str, dict[str, float]] = field(default_factory=dict)
    """Errors of the sampled latents relative to LR's own by row and pair, as far as computed."""
    _prompts: dict[str, Prompts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.pairs) < 2:
            raise DataError(f"{len(self.pairs)} pair is too few: prompts are swapped between at least two.")

    def identity(self) -> dict[str, Any]:
        """What pictures and losses depend on."""
        models = self.pipeline.models
        plain = {"tagger": fingerprint(self.plain.models.dape)} if self.plain else {}
        return plain | {
            "model": models.name,
            **{name: fingerprint(getattr(models, name)) for name in _NETWORKS},
            "precision": str(models.dtype),
            "sampling": asdict(self.settings),
            "loss_timesteps": list(self.timesteps),
            "names": [pair.name for pair in self.pairs],
            "contents": digest(path.read_bytes() for pair in self.pairs for path in (pair.lr, pair.hr)),
        }

    def fill(self, rows: Sequence[str]) -> None:
        """Make the pictures and losses of these rows that are missing.

        Raises:
            DataError: `out` holds another study, or a pair does not fit.
        """
        from tqdm import tqdm

        self._claim()
        for pair in tqdm(self.pairs, unit="pair", disable=None):
            for row in (row for row in rows if row not in self.beside):
                if not self._file(row, pair).exists() or (row in ROWS and self.latent_error(row, pair) is None):
                    save_picture(self._file(row, pair), self._make(row, pair))
            write_json(self.out / "latents.json", self.latents)
            self._fill_losses([row for row in rows if row in ROWS and row not in WITHOUT_LOSS], pair)

    def picture(self, row: str, pair: PairFile) -> Tensor:
        """A result, uint8 (3, H, W)."""
        if row in self.beside:
            return self._other_result(row, pair)
        return read_picture(self._file(row, pair))

    def loss(self, row: str, pair: PairFile) -> float | None:
        """The denoising loss of a row; None where it has none."""
        return self.losses.get(row, {}).get(pair.name)

    def latent_error(self, row: str, pair: PairFile) -> float | None:
        """‖z − z_HR‖² / ‖z_LR − z_HR‖² of a row's sampled latent z: below 1 sampling came nearer to the truth.

        None where the row samples nothing; NaN is never kept.
        """
        return self.latents.get(row, {}).get(pair.name)

    def _claim(self) -> None:
        """Take the folder, or go on with what it has."""
        path, facts = self.out / "study.json", json.loads(json.dumps(self.identity()))
        before = _kept(dict[str, Any], path)
        changed = [name for name in facts if name in before and before[name] != facts[name]]
        if changed:
            raise DataError(f"{self.out} holds a study with another {', '.join(changed)}; choose another folder.")
        write_json(path, {**before, **facts})
        self.losses = _kept(dict[str, dict[str, float]], self.out / "losses.json")
        self.latents = _kept(dict[str, dict[str, float | None]], self.out / "latents.json")

    def _file(self, row: str, pair: PairFile) -> Path:
        return self.out / row / f"{pair.name}.png"

    @torch.no_grad()
    def _make(self, row: str, pair: PairFile) -> Image.Image:
        if row in FILTERS:
            _, height, width = pair.original().shape
            return FILTERS[row](pair.photo(), (width, height))
        if row in CODED:
            return CODED[row](self.pipeline, pair, self.settings)
        inputs = ROWS[row](self.inputs(pair))
        latent = sampled(self.pipeline, inputs)
        self.latents.setdefault(row, {})[pair.name] = self._relative_error(latent, pair)
        return finished(self.pipeline, pair.photo(), latent, inputs.settings)

    def _other_result(self, row: str, pair: PairFile) -> Tensor:
        files = list_pictures(self.beside[row])
        if pair.name not in files:
            raise DataError(f"{self.beside[row]} has no picture {pair.name}; it needs one for every pair.")
        picture = read_picture(files[pair.name])
        if picture.shape != pair.original().shape:
            raise DataError(f"{files[pair.name]} and its HR differ in size; give results of the size of HR.")
        return picture

    def _relative_error(self, latent: Tensor, pair: PairFile) -> float:
        """See `latent_error`. HR is enlarged to what the networks saw where `min_size` made that larger."""
        prepared = self.pipeline.prepare([pair.photo()], self.settings)
        original = as_tensor(enlarge(as_picture(pair.original()), prepared[0]))[None]
        z_hr, z_lr = (self.pipeline.encode(pixels, self.settings) for pixels in (original, prepared))
        own = (z_lr - z_hr).square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        return float((latent - z_hr).square().sum() / own)

    def _fill_losses(self, rows: Sequence[str], pair: PairFile) -> None:
        missing = [row for row in rows if self.loss(row, pair) is None]
        if not missing:
            return
        target = make_target(
            self.pipeline, pair.photo(), pair.original(), pair.name, self.settings, timesteps=self.timesteps
        )
        inputs = self.inputs(pair)
        for row in missing:
            changed = ROWS[row](inputs)
            condition = condition_of(changed.control, self.settings)
            loss = denoising_loss(self.pipeline, replace(target, condition=condition), changed.prompts)
            self.losses.setdefault(row, {})[pair.name] = loss
        write_json(self.out / "losses.json", self.losses)

    def inputs(self, pair: PairFile) -> Inputs:
        """What the rows start from."""
        other = self.pairs[(self.pairs.index(pair) + len(self.pairs) // 2) % len(self.pairs)]
        photo = pair.photo()
        return Inputs(
            settings=self.settings,
            prompts=self._read(self.pipeline, "dape", pair),
            others=self._read(self.pipeline, "dape", other),
            start=photo,
            control=photo,
            other=resize(other.photo(), photo.size),
            plain=None if self.plain is None else self._read(self.plain, "plain", pair),
        )

    @torch.no_grad()
    def _read(self, pipeline: SeeSRPipeline, tagger: str, pair: PairFile) -> Prompts:
        key = f"{tagger} {pair.name}"
        if key not in self._prompts:
            self._prompts[key] = pipeline.read_prompts([pair.photo()], self.settings)
        return self._prompts[key]


def _kept(kind: Any, path: Path) -> Any:
    """What a study wrote before, as `kind`; empty if nothing is there.

    Raises:
        DataError: it was damaged since.
    """
    try:
        return read(kind, read_json(path), path.name) if path.exists() else {}
    except (OSError, MalformedError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it, or choose another folder.") from error
