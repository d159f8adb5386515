"""The guided noise prediction ε̂(x, t) that sampling asks for: ControlNet, U-Net, classifier-free guidance, tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..tiling.grid import Tile

PIXELS_PER_LATENT = 8


@dataclass(kw_only=True, slots=True)
class Denoiser:
    """ε̂ of a batch of B images under their prompts; call it with latents (B, 4, h, w) and a timestep.

    With `cfg` > 1 both halves run as one batch in the published order [negative, positive], with the same soft
    prompt and the same LR image in each: ε = ε_neg + cfg · (ε_pos − ε_neg). With `cfg` ≤ 1 only the positive half runs.
    """

    unet: Any
    """U-Net with RCA (`prior.build_unet`)."""
    controlnet: Any | None
    """ControlNet with RCA (`control.build_controlnet`), or None for the prior alone."""
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
    control_scale: float = 1.0
    """Multiplies every residual of the ControlNet."""
    rca_scale: float = 1.0
    """0 leaves RCA out, 1 is the trained network."""

    def __call__(self, x: Tensor, t: int | Tensor, tiles: Sequence[Tile] | None = None) -> Tensor:
        """Predict the noise of `x` (B, 4, h, w), or of its tiles stacked tile-major (T·B, 4, th, tw)."""
        copies = len(tiles) if tiles else 1
        halves = [self.negative, self.positive] if self.cfg > 1 else [self.positive]
        text = torch.cat([half.repeat(copies, 1, 1) for half in halves])
        soft = None if self.soft_prompt is None else self.soft_prompt.repeat(copies * len(halves), 1, 1)
        image = crop_tiles(self.image, tiles).repeat(len(halves), 1, 1, 1) if self.controlnet is not None else None
        eps = self._predict(torch.cat([x] * len(halves)), t, text, soft, image)
        if self.cfg <= 1:
            return eps
        eps_neg, eps_pos = eps.chunk(2)
        return eps_neg + self.cfg * (eps_pos - eps_neg)

    def _predict(self, x: Tensor, t: int | Tensor, text: Tensor, soft: Tensor | None, image: Tensor | None) -> Tensor:
        extra = {} if soft is None else {"soft_prompt": soft, "rca_scale": self.rca_scale}
        down = mid = None
        if self.controlnet is not None and self.control_scale != 0:
            down, mid = self.controlnet(
                x, t, text, image, self.control_scale, cross_attention_kwargs=extra, return_dict=False
            )
        (eps,) = self.unet(
            x,
            t,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            cross_attention_kwargs=extra,
            return_dict=False,
        )
        return eps.float()


def crop_tiles(image: Tensor, tiles: Sequence[Tile] | None) -> Tensor:
    """The pixels under each tile of the latent, stacked tile-major (T·B, 3, 8·th, 8·tw); the whole image without
    tiles."""
    if not tiles:
        return image
    p = PIXELS_PER_LATENT
    return torch.cat([image[:, :, p * s.y : p * (s.y + s.height), p * s.x : p * (s.x + s.width)] for s in tiles])
