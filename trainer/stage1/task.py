"""Stage 1: a tagger learns to see through degradation (paper §3.2, equation 1).

    python -m trainer.stage1 --recipe NAME --teacher FILE --data PATH --out DIR [--loop.steps N …]

The teacher looks at the HR photo, the student (the same weights with a low-rank adapter) at its degraded version, as
published enlarged to the same size; both prompts of the student are pulled to the teacher's. Out come the adapter and
the merged DAPE.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seesr_core.dape import DAPE, DAPEOutput, Vocabulary, tagger_input
from seesr_core.method.losses import PromptLoss, prompt_loss
from seesr_core.pictures.sizes import from_u8, to_u8

from ..data.cache import FrozenCache, network_key
from ..data.fingerprints import digest, drawn_from, fingerprint, same_photos
from ..data.order import Stream, seeded
from ..data.pairs import check_groups, check_returns, given_pairs, make_crops, make_pairs
from ..data.photos import Photo
from ..data.pool import Pool, PreparedPair
from ..engine.identity import flat
from ..engine.journal import Figures
from ..engine.processes import refuse_sharded_adapters
from .networks import add_lora
from .recipes import Stage1Config
from .validation import Shown, hold_out

if TYPE_CHECKING:
    from ..degradation import Pair

log = logging.getLogger(__name__)


class Stage1Task:
    """Equation 1 on degraded crops; `trained` is the student as a peft model whose adapter alone is trained."""

    def __init__(
        self,
        config: Stage1Config,
        teacher: DAPE,
        vocabulary: Vocabulary,
        photos: Sequence[Photo],
        *,
        pool_folder: Path | None = None,
        teacher_folder: Path | None = None,
    ) -> None:
        self.config = config
        refuse_sharded_adapters()
        check_groups(config.loop, config.degradation_group)
        self.device = config.loop.resolve_device()
        self.size = teacher.config.image_size
        training, shown = hold_out(photos, config.samples)
        seed = config.loop.seed
        self.crops = make_crops(training, config)
        self.shown = Shown(make_crops(shown, config, workers=0), config, vocabulary)
        self.pool = Pool(config.pool * config.loop.parts, self._pool_key(), pool_folder, kind=PreparedPair)
        self.teacher = teacher.requires_grad_(False).eval().to(self.device)
        self.seen: FrozenCache | None = None
        if config.cache_teacher:
            if not config.pool:
                check_returns(self.crops, "cache_teacher")
            self.seen = FrozenCache(network_key(config.loop, self.teacher), teacher_folder, parts=2)
        student = add_lora(copy.deepcopy(self.teacher), config, seeded(seed, Stream.STAGE1_ADAPTER))
        self.trained = student.to(self.device).train()

    @property
    def photos(self) -> Sequence[Photo]:
        """What is drawn from."""
        return self.crops.photos

    @property
    def frozen(self) -> list[nn.Module]:
        """Networks that are only looked through and not trained."""
        return [self.teacher]

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """Equation 1 of one part of a batch, its terms as figures."""
        lr, hr = self._batch(step)
        loss = self._compare(self.trained(self._prepare(lr)), self._target(self._prepare(hr)))
        return loss.total, {"tokens": loss.tokens.detach(), "logits": loss.logits.detach()}

    @torch.no_grad()
    def _target(self, image_B3HW: Tensor) -> DAPEOutput:
        """What the teacher makes of its input, from the cache if it has seen it before."""
        if self.seen is None:
            return self.teacher(image_B3HW)
        found = self.seen.batch([image_B3HW], lambda: self.teacher(image_B3HW))
        return DAPEOutput(*(part.to(self.device) for part in found))

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The degraded and the clean crops of a part of a batch, from the pool if there is one."""
        if not self.config.pool:
            return self._fresh(step)
        kept = self.pool.get(step, self._prepared)
        return from_u8(kept.lr.to(self.device)), from_u8(kept.hr.to(self.device))

    def _fresh(self, number: int) -> tuple[Tensor, Tensor]:
        """Degraded anew, or as given with the photos."""
        count = self.config.loop.micro_batch
        if self.crops.paired:
            pair, _ = given_pairs(self.crops, number, count, device=self.device)
            return self._looked_at(pair), pair.hr_usm
        return self._pair(self.crops.batch(number, count)[0], number)

    def _prepared(self, number: int) -> PreparedPair:
        lr, hr = self._fresh(number)
        return PreparedPair(*(to_u8(image).cpu() for image in (lr, hr)))

    def _pool_key(self) -> str:
        """Everything that a prepared batch depends on."""
        settings = asdict(self.config)
        parts = [settings[name] for name in ("crop", "min_scale", "degradation", "degradation_group", "student_input")]
        parts += ["by image", self.config.loop.seed, self.config.loop.micro_batch, same_photos(self.crops.photos)]
        if self.config.fixed_crops:
            parts.append("fixed crops")
        if self.crops.paired:
            parts.append(drawn_from(self.photos)["lr"])
        return digest(repr(part).encode() for part in parts)

    def _pair(self, hr_B3HW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Degraded crops as the student looks at them, and the clean ones."""
        numbers, first = (self.config.loop.seed, Stream.STAGE1_DEGRADATION), step * self.config.loop.micro_batch
        group = self.config.degradation_group
        pair = make_pairs(
            hr_B3HW, self.config.degradation, numbers=numbers, first=first, group=group, device=self.device
        )
        return self._looked_at(pair), pair.hr_usm

    def _looked_at(self, pair: Pair) -> Tensor:
        return pair.lr if self.config.student_input == "small" else pair.lr_upsampled

    def _prepare(self, image_B3HW: Tensor) -> Tensor:
        return tagger_input(image_B3HW, self.size, antialias=self.config.antialias)

    def _compare(self, output: DAPEOutput, target: DAPEOutput) -> PromptLoss:
        return prompt_loss(*output, *target, weight=self.config.logits_weight)

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> dict[str, float]:
        """Write and judge what each tagger sees on the photos kept out (`Shown`)."""
        lr, hr = self._pair(self.shown.drawn(), -1)
        self.trained.eval()
        seen = {
            "teacher_on_hr": self.teacher(self._prepare(hr)),
            "plain_on_lr": self.teacher(self._prepare(lr)),
            "dape_on_lr": self.trained(self._prepare(lr)),
        }
        self.trained.train()
        return self.shown.write(folder, step, lr, hr, seen)

    def identity(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, beside the settings of the loop."""
        settings = asdict(self.config)
        kept = {name: settings[name] for name in settings.keys() - {"loop", "export", "cache_teacher"}}
        return {
            "stage": 1,
            **flat(kept),
            "photos": same_photos(self.photos),
            **{name: text for name, text in drawn_from(self.photos).items() if name != "tags"},
            "teacher": fingerprint(self.teacher),
        }
