"""The two processes of a sampling run side by side, and what they tell each other after every step.

A run is asked by noise level and not by step: whatever the solver does, a question at a level that was asked before
gets the same answer, and one at a new level goes on from the nearest noisier level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.schedule import acp_at, x0_from_eps
from .labels import nearest_labels
from .model import SegSR

PredictLabels = Callable[[Tensor, float, "Tensor | None"], Tensor]
"""(S_t, ᾱ_t, I_t) → ŝ0, of whole latents."""
_NOISE_STREAM = 0x5E65


@dataclass(slots=True)
class Moment:
    """Both processes at one noise level."""

    acp: float
    """ᾱ_t."""
    noisy: Tensor
    """S_t (B, N, h, w)."""
    s0: Tensor
    """SegDM's estimate of the label bits, in [−1, 1]."""
    condition: Tensor | None
    """C_t, what is added to the ControlNet's conditioning embedding; None at the first level."""
    z0: Tensor | None = None
    """SRDM's estimate of the clean latent, once it is known."""


def segmentation_noise(seeds: Sequence[int], like: Tensor) -> Tensor:
    """Noise of the segmentations of a batch (B, N, h, w), of each picture's own seed and apart from the picture's."""
    generators = [torch.Generator("cpu").manual_seed((seed ^ _NOISE_STREAM) & (2**63 - 1)) for seed in seeds]
    return torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators]).to(like)


class JointRun:
    """The segmentation's side of one sampling run.

    Args:
        segsr: the networks.
        predict: asks SegDM.
        noise: of the segmentation (B, N, h, w).
        initial: label bits to start from (B, N, h, w), 0 where nothing is known; None knows nothing.
        strength: factor on what SRDM is told.
    """

    def __init__(
        self,
        segsr: SegSR,
        predict: PredictLabels,
        noise: Tensor,
        *,
        initial: Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        self.segsr, self.predict, self.noise, self.initial, self.strength = segsr, predict, noise, initial, strength
        self._moments: dict[float, Moment] = {}

    @torch.no_grad()
    def at(self, acp: float) -> Moment:
        """The moment of a noise level."""
        if acp not in self._moments:
            self._moments[acp] = self._next(acp)
        return self._moments[acp]

    def saw(self, acp: float, z0: Tensor) -> None:
        """Note the clean latent (B, C, h, w) that SRDM estimated at a level that was asked for."""
        self._moments[acp].z0 = z0

    def labels(self) -> Tensor:
        """The classes at the cleanest level so far, (B, h, w)."""
        return nearest_labels(self._moments[max(self._moments)].s0, self.segsr.codes)

    def _next(self, acp: float) -> Moment:
        noisier = [level for level in self._moments if level < acp]
        if not noisier:
            noisy, image, condition = self.segsr.start(self.noise, acp, self.initial), None, None
        else:
            before = self._moments[max(noisier)]
            noisy = self.segsr.step(before.noisy, before.s0, before.acp, acp)
            image, condition = self._bridged(before)
        return Moment(acp, noisy, self.predict(noisy, acp, image).clamp(-1, 1), condition)

    def _bridged(self, before: Moment) -> tuple[Tensor | None, Tensor | None]:
        """I_t and C_t, from the step before."""
        if before.z0 is None or not self.segsr.config.bridged:
            return None, None
        levels = torch.full((len(before.noisy),), before.acp, device=before.noisy.device)
        condition = self.segsr.bridge.segmentation_condition(before.s0, levels)
        image = self.segsr.bridge.image_condition(before.z0.to(before.noisy), levels)
        return image, self.strength * condition if self.strength else None


@dataclass(kw_only=True, slots=True)
class JointDenoiser:
    """The joint step as a denoiser (x, t) → ε: SRDM under SegDM's condition, and SegDM under SRDM's."""

    denoise: Callable[[Tensor, int, Tensor | None], Tensor]
    """SRDM: (x, t, C_t) → ε."""
    run: JointRun
    """The segmentation's side."""

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """ε of `x` (B, C, h, w)."""
        acp = acp_at(t)
        eps = self.denoise(x, t, self.run.at(acp).condition)
        self.run.saw(acp, x0_from_eps(x.float(), eps.float(), acp))
        return eps
