"""SegDM on latents of any size: tiled as the picture is, predictions averaged under the same window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tiling.grid import Layout, Tile, TiledDenoiser, Window
from ..tiling.runner import parts_of
from .model import SegSR


@dataclass(kw_only=True, slots=True)
class LabelPredictor:
    """Asks SegDM about whole latents (`joint.PredictLabels`), a batch of tiles at a time."""

    segsr: SegSR
    """The networks."""
    features: Tensor
    """F_lq of the whole latents (B, C, h, w), see `SegDM.features`."""
    tile: int = 96
    """As in `TiledDenoiser`, like the next four."""
    overlap: int = 4
    tile_batch: int = 1
    layout: Layout = "published"
    window: Window = "reference"

    def __call__(self, noisy: Tensor, acp: float, image: Tensor | None) -> Tensor:
        """ŝ0 (B, N, h, w) of S_t under I_t."""

        def predict(x: Tensor, t: int, tiles: Sequence[Tile] | None = None) -> Tensor:
            levels = torch.full((len(x),), acp, device=x.device)
            told = None if image is None else parts_of(image, tiles)
            found: Tensor = self.segsr.segdm(x, parts_of(self.features, tiles), levels, told)
            return found

        tiled = TiledDenoiser(
            denoise=predict,
            tile=self.tile,
            overlap=self.overlap,
            tile_batch=self.tile_batch,
            layout=self.layout,
            window=self.window,
        )
        return tiled(noisy, 0)
