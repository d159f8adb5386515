"""How stage 2 is judged while it trains: fixed photos, fixed noise, fixed timesteps, so that figures can be compared.

Of every LR/HR pair, the loss at one timestep of each quarter of the schedule, and the photo as the finished method
restores it, measured against HR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seesr_core.dape import Vocabulary, tagger_input
from seesr_core.errors import DataError, SettingsError
from seesr_core.method.losses import noise_loss
from seesr_core.method.text import training_text
from seesr_core.pictures.sizes import from_u8, to_u8
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.settings import UpscaleSettings

from ..data.order import Stream, by_image
from ..engine.processes import local_device
from ..engine.samples import save_grid
from ..evaluate.pictures import as_picture, as_tensor, list_pictures, read_picture, unmatched
from ..evaluate.quality.builds import find_builds
from ..evaluate.quality.measure import Measure, means, read_niqe_model
from ..evaluate.quality.metrics import BY_KEY, Build, choose_metrics
from .batches import Batch
from .networks import Networks

BANDS = ((0, 125), (250, 375), (500, 625), (750, 875))
"""First timestep of each quarter, and the one at which the loss is taken."""
VALIDATION_STEPS = 20
"""Sampling steps where nobody says how many: the published 50 take too long to judge a run by."""
SHOWN = 8
_ALIGN = 64


@dataclass(kw_only=True, slots=True)
class ValidationPair:
    """A photo to restore, and the original."""

    name: str
    """Name of the pair's files."""
    lr: Tensor
    """LR, uint8 (3, h, w)."""
    hr: Tensor
    """HR, uint8 (3, 4h, 4w)."""


def read_pairs(folder: Path) -> list[ValidationPair]:
    """The pairs in `folder/LR` and `folder/HR`, as `python -m trainer.evaluate.degrade` writes them.

    Raises:
        DataError: a folder is missing, a photo has no partner, or HR is not four times LR.
    """
    pictures = {kind: list_pictures(folder / kind) for kind in ("LR", "HR")}
    if lonely := unmatched(pictures):
        kind, names = next(iter(lonely.items()))
        raise DataError(f"{folder / kind} has {', '.join(names[:5])} without a partner of that name; remove or add it.")
    pairs = [
        ValidationPair(name=name, lr=read_picture(path), hr=read_picture(pictures["HR"][name]))
        for name, path in pictures["LR"].items()
    ]
    for pair in pairs:
        if tuple(pair.hr.shape[1:]) != tuple(4 * side for side in pair.lr.shape[1:]):
            raise DataError(
                f"{folder}: HR of {pair.name} has {tuple(pair.hr.shape[1:])} pixels, expected four times its LR's "
                f"{tuple(pair.lr.shape[1:])}; make the pairs by `python -m trainer.evaluate.degrade`."
            )
    return pairs


def further_builds(metrics: Sequence[str], niqe_params: Path | None) -> Mapping[str, Build]:
    """What computes the metrics of these names.

    Raises:
        SettingsError: an unknown name, one that cannot be computed here, or one of a whole set.
    """
    if not metrics:
        return {}
    chosen = choose_metrics(metrics)
    if of_sets := [metric.key for metric in chosen if metric.of_set]:
        raise SettingsError(
            f"{', '.join(of_sets)} needs a whole set of pictures, not those of a validation; measure it afterwards by "
            "`python -m trainer.evaluate`."
        )
    device = local_device()
    builds = find_builds(chosen, backend="auto", originals=True, niqe_params=niqe_params, device=device)
    builds.check(metrics)
    return builds.pictures


class Validation:
    """Figures and pictures of the present state of stage 2.

    Args:
        pairs: photos to judge by.
        vocabulary: the tagger's.
        settings: of sampling, over the published ones.
        niqe_params: NIQE's published parameters; None leaves NIQE out.
        metrics: further figures, by their names in `trainer.evaluate`.
    """

    def __init__(
        self,
        pairs: list[ValidationPair],
        vocabulary: Vocabulary,
        settings: Mapping[str, Any] | None = None,
        niqe_params: Path | None = None,
        metrics: Sequence[str] = (),
    ) -> None:
        self.pairs, self.vocabulary = pairs, vocabulary
        self.settings = UpscaleSettings.for_model(dict(settings or {}))
        self.measure = Measure(niqe_model=read_niqe_model(niqe_params) if niqe_params else None)
        self.builds = further_builds(metrics, niqe_params)

    @classmethod
    def of_folder(
        cls,
        folder: Path | None,
        vocabulary: Vocabulary,
        settings: Mapping[str, Any],
        niqe_params: Path | None = None,
        metrics: Sequence[str] = (),
    ) -> Validation | None:
        """Validation on the pairs in a folder; None without a folder.

        Raises:
            SettingsError: metrics without a folder, or as `further_builds`.
        """
        if metrics and not folder:
            raise SettingsError("--metrics are figures of the validation: name a folder of pairs by --validate.")
        return cls(read_pairs(folder), vocabulary, settings, niqe_params, metrics) if folder else None

    @torch.no_grad()
    def __call__(self, networks: Networks, folder: Path, step: int) -> dict[str, float]:
        """Write `validation-<step>.png` (rows LR, SR, HR) and return the means of all figures."""
        figures, _ = means(self.losses(networks, number, pair) for number, pair in enumerate(self.pairs))
        restored = [self.restore(networks, pair) for pair in self.pairs]
        judged, _ = means(self._judge(sr, pair.hr) for sr, pair in zip(restored, self.pairs, strict=True))
        self._draw(folder / f"validation-{step:06d}.png", restored)
        return {**figures, **judged}

    def _judge(self, sr: Tensor, hr: Tensor) -> dict[str, float]:
        """The figures of one picture; those that cannot be computed of it are left out."""
        found = self.measure(sr, hr)
        for name, build in self.builds.items():
            (outcome,) = build.measure([sr], [hr] if BY_KEY[name].needs_original else [])
            found |= {name: outcome.value} if outcome.value is not None else {}
        return found

    def losses(self, networks: Networks, number: int, pair: ValidationPair) -> dict[str, float]:
        """Equation 2 at each of `BANDS` and its mean, `val_loss`; the noise depends on the pair's number alone."""
        batch = self._batch(networks, number, pair)
        text = networks.encode_text(batch.prompts)
        found = {}
        for first, t in BANDS:
            batch.timesteps = torch.full_like(batch.timesteps, t)
            pred = networks.predict(
                batch.noisy(), batch.timesteps, text, image=batch.condition, soft_prompt=batch.soft_prompt
            )
            found[f"val_loss_t{first}"] = float(noise_loss(pred, batch.noise))
        return {"val_loss": sum(found.values()) / len(found), **found}

    def _batch(self, networks: Networks, number: int, pair: ValidationPair) -> Batch:
        height, width = (max(side // _ALIGN, 1) * _ALIGN for side in pair.hr.shape[1:])
        hr, lr = (from_u8(x[None].to(networks.device)) for x in (pair.hr, pair.lr))
        large = F.interpolate(lr, hr.shape[2:], mode="bicubic").clamp(0, 1)
        hr, condition = hr[..., :height, :width], from_u8(to_u8(large[..., :height, :width]))
        generators = by_image(0, Stream.VALIDATION, images=[number])
        latents = networks.encode_image(hr, generators)
        return Batch(
            target=hr,
            condition=condition,
            latents=latents,
            noise=torch.randn(latents.shape, generator=generators[0]).to(networks.device),
            timesteps=torch.zeros(1, dtype=torch.long, device=networks.device),
            soft_prompt=networks.soft_prompt(condition),
            prompts=[self._tags(networks, condition)],
        )

    def _tags(self, networks: Networks, condition: Tensor) -> str:
        dape = networks.dape
        logits = dape(tagger_input(condition, dape.config.image_size)).logits_BN
        (tags,) = self.vocabulary.select(logits.float().cpu())
        return training_text([tag.name for tag in tags])

    def restore(self, networks: Networks, pair: ValidationPair) -> Tensor:
        """The whole method on one photo, uint8 (3, 4h, 4w); the same noise every time."""
        models = networks.as_models(self.vocabulary)
        return as_tensor(SeeSRPipeline(models=models)(as_picture(pair.lr), self.settings).image)

    def _draw(self, path: Path, restored: list[Tensor]) -> None:
        """The middles of the first photos, since photos differ in size."""
        shown = list(zip(self.pairs, restored, strict=True))[:SHOWN]
        side = min(min(pair.hr.shape[1:]) for pair, _ in shown)
        large = [F.interpolate(pair.lr[None].float(), pair.hr.shape[1:], mode="nearest")[0] for pair, _ in shown]
        rows = [large, [sr for _, sr in shown], [pair.hr for pair, _ in shown]]
        middles = [from_u8(torch.stack([_middle(image, side) for image in row])) for row in rows]
        save_grid(path, middles, ("LR", "SR", "HR"))


def _middle(image_3HW: Tensor, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in image_3HW.shape[1:])
    return image_3HW[:, top : top + side, left : left + side]
