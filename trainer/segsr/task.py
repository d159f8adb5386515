"""The joint training of SegSR: L = ‖ε − ε_θ‖² + λ·‖s0 − s_φ‖², SeeSR frozen but for the ControlNet's image encoder.

Every image is trained at a step of the sampling grid, in the state in which sampling would come there: through passes
of the networks themselves (without gradients), or, for the rest of the images, from the true latents. The noise ε is
then what stands between the state and the true latents, in both cases.

Shape letters: B images, C channels of the picture's latents, N bits of a label, h w latent cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seesr_core.dape import Vocabulary
from seesr_core.method.losses import noise_loss
from seesr_core.method.sampling import start_latent
from seesr_core.method.schedule import alphas_cumprod, q_sample, start_for, x0_from_eps
from seesr_core.pictures.sizes import from_u8
from seesr_core.segsr.labels import VOID, nearest_labels, paint
from seesr_core.segsr.model import SegSR

from ..data.crops import Crops
from ..data.fingerprints import fingerprint
from ..engine.journal import Figures
from ..engine.samples import save_grid
from ..stage2.networks import Networks
from ..stage2.task import Stage2Task
from .batches import LabelCrops, LabelledBatch, LabelledBatches
from .masks import Masks
from .recipes import SegSRTrainConfig
from .sampling import sample_batch

LABELS = ("LR", "SR", "labels", "true labels", "HR")
"""Of the rows of a sample picture."""


@dataclass(slots=True)
class Reached:
    """Both processes on their way; row i is image i. What is decided by, `at` and `told`, lies on the CPU."""

    at: Tensor
    """Place in the sampling grid (B,)."""
    z: Tensor
    """Picture's latents at it (B, C, h, w)."""
    s: Tensor
    """Segmentation's latents at it (B, N, h, w)."""
    told: Tensor
    """Whether a step before told anything (B,), bool."""
    z0: Tensor
    """The clean latents that it told."""
    s0: Tensor
    """The label bits that it told."""
    acp: Tensor
    """ᾱ of that step (B,)."""

    def rows(self, which: Tensor) -> Reached:
        """Some of the images."""
        every = (getattr(self, name) for name in self.__slots__)
        return Reached(*(value[which.to(value.device)] for value in every))

    def put(self, which: Tensor, rows: Reached) -> None:
        """Put them back."""
        for name in self.__slots__:
            kept = getattr(self, name)
            kept[which.to(kept.device)] = getattr(rows, name).to(kept.dtype)  # autocast answers in half precision


class SegSRTask(Stage2Task):
    """Both predictions of a step, on degraded crops with labels."""

    config: SegSRTrainConfig
    batches: LabelledBatches

    def __init__(
        self,
        config: SegSRTrainConfig,
        networks: Networks,
        crops: Crops,
        segsr: SegSR,
        masks: Masks,
        *,
        vocabulary: Vocabulary,
        tags: Sequence[str] = (),
        **folders: Any,
    ) -> None:
        self.batches_type = partial(LabelledBatches, labels=LabelCrops(crops, masks))  # type: ignore[assignment]
        super().__init__(config, networks, crops, tags or [""] * len(crops), **folders)
        self.segsr = segsr.to(self.device)
        self.models = networks.as_models(vocabulary, segsr=segsr)
        self.trained = nn.ModuleDict({"controlnet": networks.controlnet, "segsr": segsr})
        if config.mode == "segmenter":
            networks.controlnet.requires_grad_(False)
        self.acp = alphas_cumprod().to(self.device)[torch.tensor(config.grid())]

    @property
    def frozen(self) -> list[nn.Module]:
        """Networks that are only looked through and not trained."""
        return [*super().frozen, self.networks.unet]

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """The joint loss of one part of a batch."""
        batch = self.batches.get(step)
        text = self.text_states(batch.prompts)
        features = self.features(batch)
        if self.config.mode == "segmenter":
            label_loss = self.label_loss(self.answer(features), batch)
            return label_loss, {"label_loss": label_loss.detach()}
        state = self.reach(batch, text, features)
        eps, s0 = self.both(state, batch, text, features)
        acp = self._acp(state.at)
        noise = (state.z - acp**0.5 * batch.latents) / (1.0 - acp) ** 0.5
        picture_loss, label_loss = noise_loss(eps, noise), self.label_loss(s0, batch)
        total = picture_loss + self.config.label_weight * label_loss
        return total, {"picture_loss": picture_loss.detach(), "label_loss": label_loss.detach()}

    def features(self, batch: LabelledBatch) -> Tensor:
        """F_lq."""
        assert batch.soft_prompt is not None
        return self.segsr.segdm.features(batch.z_lr, batch.soft_prompt)

    def label_loss(self, s0: Tensor, batch: LabelledBatch) -> Tensor:
        """Mean squared error of the bits over the cells that have a label."""
        known = (batch.bits != 0).float()
        squared: Tensor = ((s0.float() - batch.bits).square() * known).sum() / known.sum().clamp_min(1)
        return squared

    def answer(self, features: Tensor) -> Tensor:
        """SegDM as a plain segmenter: asked once, without noise."""
        noisy = features.new_zeros(len(features), self.segsr.bits, *features.shape[2:])
        found: Tensor = self.segsr.segdm(noisy, features, self.acp[:1].expand(len(features)))
        return found

    def both(
        self, state: Reached, batch: LabelledBatch, text: Tensor, features: Tensor, which: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ε_θ and s_φ of the images `which`, all if None, whose state is given."""
        rows = (torch.arange(len(text)) if which is None else which).to(text.device)
        hint = image = None
        if self.config.mode == "joint":
            told = state.told.view(-1, 1, 1, 1).float().to(text.device)
            hint = told * self.segsr.bridge.segmentation_condition(state.s0, state.acp)
            image = told * self.segsr.bridge.image_condition(state.z0, state.acp)
        t = torch.tensor(self.config.grid())[state.at].to(text.device)
        soft = None if batch.soft_prompt is None else batch.soft_prompt[rows]
        eps = self.networks.predict(
            state.z, t, text[rows], image=batch.condition[rows], soft_prompt=soft, hint=hint
        ).float()
        return eps, self.segsr.segdm(state.s, features[rows], self._acp(state.at).flatten(), image)

    @torch.no_grad()
    def reach(self, batch: LabelledBatch, text: Tensor, features: Tensor) -> Reached:
        """Each image at its step of the grid."""
        first = torch.where(batch.own, (batch.index - self.config.unroll).clamp_min(0), batch.index)
        state = self.begin(batch, first)
        for _ in range(self.config.unroll):
            which = torch.nonzero(state.at < batch.index)[:, 0]
            if len(which):
                rows = state.rows(which)
                eps, s0 = self.both(rows, batch, text, features, which)
                state.put(which, self.step(rows, eps, s0.clamp(-1, 1)))
        return state

    def begin(self, batch: LabelledBatch, at: Tensor) -> Reached:
        """Images at the first step as sampling begins, at a later one from the true latents."""
        grid, acp = self.config.grid(), self._acp(at)
        start = start_latent(batch.noise, z_lr=batch.z_lr, start_timestep=start_for(grid, self.config.start_timestep))
        first = (at == 0).view(-1, 1, 1, 1).to(acp.device)
        true_z, true_s = q_sample(batch.latents, batch.noise, acp), self.segsr.start(batch.label_noise, acp, batch.bits)
        before = self._acp((at - 1).clamp_min(0))
        spread = ((1 - before) / before).sqrt()
        return Reached(
            at=at.clone(),
            z=torch.where(first, start, true_z),
            s=torch.where(first, self.segsr.start(batch.label_noise, acp), true_s),
            told=(at > 0) & ~batch.own,
            z0=batch.latents + spread * batch.told[0],
            s0=(batch.bits + spread * batch.told[1]).clamp(-1, 1),
            acp=before.flatten(),
        )

    def step(self, rows: Reached, eps: Tensor, s0: Tensor) -> Reached:
        """Both processes one step of the grid further (DDIM)."""
        acp, following = self._acp(rows.at), self._acp(rows.at + 1)
        z0 = x0_from_eps(rows.z, eps, acp)
        return Reached(
            at=rows.at + 1,
            z=q_sample(z0, eps, following),
            s=self.segsr.step(rows.s, s0, acp, following),
            told=torch.ones_like(rows.told),
            z0=z0,
            s0=s0,
            acp=acp.flatten(),
        )

    def _acp(self, at: Tensor) -> Tensor:
        """ᾱ at places of the sampling grid (B, 1, 1, 1)."""
        return self.acp[at.to(self.acp.device)].view(-1, 1, 1, 1)

    def identity(self) -> dict[str, Any]:
        """What must stay the same when the training is resumed."""
        masks = self.batches.labels.masks
        return {**super().identity(), "labels": masks.fingerprint(), "unet": fingerprint(self.networks.unet)}

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> Mapping[str, float]:
        """LR, SR and labels as sampling gives them, true labels and HR; and the error of both."""
        batch = self.batches.get(0)
        if self.config.mode == "segmenter":
            bits = self.answer(self.features(batch))
            z, labels = batch.z_lr, nearest_labels(bits, self.segsr.codes)
        else:
            settings = self.config.sampling()
            z, labels = sample_batch(self.models, batch, self.text_states(batch.prompts), settings)
        sr = self.networks.decode(z)
        true = nearest_labels(batch.bits, self.segsr.codes)
        known = (batch.bits != 0).any(1)
        true = torch.where(known, true, VOID)
        shown = [self._painted(one, sr.shape[2:]) for one in (labels, true)]
        rows = (batch.condition, sr, *shown, batch.target)
        save_grid(folder / f"{step:06d}.png", [row[:8] for row in rows], LABELS)
        right = (labels == true)[known].float().mean() if bool(known.any()) else torch.tensor(0.0)
        return {"val_loss": float((z - batch.latents).square().mean()), "val_labels_right": float(right)}

    def _painted(self, labels: Tensor, sides: Sequence[int]) -> Tensor:
        picture = from_u8(paint(labels, self.segsr.classes.palette))
        return nn.functional.interpolate(picture, tuple(sides), mode="nearest")
