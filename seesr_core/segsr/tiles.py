"""SegDM on latents of any size: tiled as the picture is, predictions averaged under the same window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tiling.grid import Tile, TiledDenoiser
from ..tiling.runner import parts_of
from .model import SegSR


@dataclass(kw_only=True, slots=True)
class LabelPredictor:
    """Asks SegDM about whole latents (`joint.PredictLabels`), a batch of tiles at a time."""

    segsr: SegSR
    """The networks."""
    features: Tensor
    """F_lq of the whole latents (B, C, h, w), see `SegDM.features`."""
    tiled: Callable[..., TiledDenoiser]
    """Makes the tiles' denoiser of its `denoise`."""

    def __call__(self, noisy: Tensor, acp: float, image: Tensor | None) -> Tensor:
        """ŝ0 (B, N, h, w) of S_t under I_t."""

        def predict(x: Tensor, t: int, tiles: Sequence[Tile] | None = None) -> Tensor:
            levels = torch.full((len(x),), acp, device=x.device)
            told = None if image is None else parts_of(image, tiles)
            found: Tensor = self.segsr.segdm(x, parts_of(self.features, tiles), levels, told)
            return found

        return self.tiled(denoise=predict)(noisy, 0)
