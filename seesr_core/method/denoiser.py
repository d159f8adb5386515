"""The noise prediction ε_θ(x, t) of ControlNet and U-Net with RCA, and the guided one that sampling asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .guidance import guided, guides, targeted
from .regions import Regions


def predict_noise(
    unet: Any,
    controlnet: Any | None,
    x: Tensor,
    t: int | Tensor,
    text: Tensor,
    *,
    image: Tensor | None = None,
    soft_prompt: Tensor | None = None,
    control_scale: float = 1.0,
    rca_scale: float = 1.0,
    regions: Regions | None = None,
    hint: Tensor | None = None,
) -> Tensor:
    """ε_θ(x, t) of one pass of the networks, in the dtype that the U-Net computes in (paper, figure 2).

    Args:
        unet: U-Net with RCA (`build_unet`).
        controlnet: ControlNet with RCA (`build_controlnet`); None is the prior alone.
        x: noisy latents (B, C, h, w).
        t: their timestep, or one each (B,).
        text: text states (B, L, D).
        image: what conditions the ControlNet, (B, 3, 8h, 8w) in [0, 1], or what its image encoder makes of it.
        soft_prompt: DAPE's tokens (B, L, D); None leaves RCA out of both networks.
        control_scale: multiplies every residual of the ControlNet; 0 does not run it.
        rca_scale: 0 leaves RCA out, 1 is the trained network.
        regions: where words act, in both networks' text attention; None: everywhere.
        hint: added to the ControlNet's conditioning embedding, (B, first width, h, w): SegSR's C_t; None adds nothing.
    """
    extra: dict[str, Any] = {} if soft_prompt is None else {"soft_prompt": soft_prompt, "rca_scale": rca_scale}
    if regions is not None:
        extra["regions"] = regions
    down = mid = None
    if controlnet is not None and control_scale != 0:
        with _added_to_conditioning(controlnet, hint):
            down, mid = controlnet(x, t, text, image, control_scale, cross_attention_kwargs=extra, return_dict=False)
    (eps,) = unet(
        x,
        t,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        cross_attention_kwargs=extra,
        return_dict=False,
    )
    predicted: Tensor = eps
    return predicted


@contextlib.contextmanager
def _added_to_conditioning(controlnet: Any, hint: Tensor | None) -> Iterator[None]:
    """Within the block what the ControlNet's image encoder finds has `hint` added to it."""
    if hint is None:
        yield
        return
    encoder = controlnet.controlnet_cond_embedding
    handle = encoder.register_forward_hook(lambda module, given, found: found + hint.to(found))
    try:
        yield
    finally:
        handle.remove()


@dataclass(kw_only=True, slots=True)
class Denoiser:
    """ε̂ of a batch of B images under their prompts; call it with latents (B, 4, h, w) and a timestep.

    With `cfg` > 1 both halves run as one batch in the published order [negative, positive], with the same soft
    prompt and the same LR image in each: ε = ε_neg + cfg · (ε_pos − ε_neg). With `cfg` ≤ 1 only the positive half runs.
    """

    unet: Any
    """U-Net with RCA (`unet.build_unet`)."""
    controlnet: Any | None
    """ControlNet with RCA (`controlnet.build_controlnet`), or None for the prior alone."""
    positive: Tensor
    """Text states (B, 77, D) of tags and prompt."""
    negative: Tensor
    """Text states (B, 77, D) of the negative prompt."""
    soft_prompt: Tensor | None
    """DAPE's tokens (B, L, C); None runs without RCA."""
    image: Tensor
    """The prepared LR image (B, 3, 8h, 8w) in [0, 1]."""
    cfg: float = 5.5
    """Guidance scale."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Shares of the noise schedule between which guidance acts; elsewhere only the positive half runs."""
    control_scale: float = 1.0
    """Multiplies every residual of the ControlNet."""
    rca_scale: float = 1.0
    """0 leaves RCA out, 1 is the trained network."""
    regions: Regions | None = None
    """Where the words of the positive half act; None: everywhere."""
    share: Tensor | None = None
    """Share of the guidance of each cell, (B, 1, h, w); None: all of it everywhere."""
    embed: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor | None] | None = None
    """Told the image and the ControlNet's image encoder, it returns what that found in the image before, or None; None
    asks in every call."""
    hint: Tensor | None = None
    """What is added to the ControlNet's conditioning embedding, (B, first width, h, w); None: nothing."""

    def __call__(self, x: Tensor, t: int | Tensor) -> Tensor:
        """Predict the noise of `x` (B, C, h, w) at one timestep, or at one each (B,); float32."""
        guided_here = self.cfg > 1 and (self.cfg_interval == (0.0, 1.0) or guides(self.cfg_interval, int(t)))
        halves = [self.negative, self.positive] if guided_here else [self.positive]
        t = t.repeat(len(halves)) if isinstance(t, Tensor) and t.ndim else t
        eps = predict_noise(
            self.unet,
            self.controlnet,
            torch.cat([x] * len(halves)),
            t,
            torch.cat(halves),
            image=self._condition(self.image.repeat(len(halves), 1, 1, 1)),
            soft_prompt=None if self.soft_prompt is None else self.soft_prompt.repeat(len(halves), 1, 1),
            control_scale=self.control_scale,
            rca_scale=self.rca_scale,
            regions=self.regions and self.regions.beside(len(x) * (len(halves) - 1)),
            hint=None if self.hint is None else self.hint.repeat(len(halves), 1, 1, 1),
        ).float()
        if not guided_here:
            return eps
        eps_neg, eps_pos = eps.chunk(2)
        return guided(eps_neg, eps_pos if self.share is None else targeted(eps_neg, eps_pos, self.share), self.cfg)

    def _condition(self, image: Tensor) -> Tensor:
        """What the ControlNet is given of an image."""
        if self.embed is None or self.controlnet is None or self.control_scale == 0:
            return image
        known = self.embed(image, self.controlnet.controlnet_cond_embedding)
        return image if known is None else known
