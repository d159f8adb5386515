"""A prompt for every tile: which part of the photo a tile shows, and which prompt a tile takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .grid import Tile

LocalPrompts = Literal["off", "tags", "soft", "both"]
LOCAL_PROMPTS: tuple[LocalPrompts, ...] = ("off", "tags", "soft", "both")


def photo_part(photo_BCHW: Tensor, tile: Tile, height: int, width: int) -> Tensor:
    """The part of a photo that a tile of its latent shows, widened to whole pixels: a view (B, C, H', W').

    Args:
        photo_BCHW: the photo at its own size.
        tile: in latent cells.
        height: rows of the whole latent.
        width: columns of the whole latent.
    """
    rows, columns = photo_BCHW.shape[-2:]
    top, bottom = _pixels(tile.y, tile.height, rows, height)
    left, right = _pixels(tile.x, tile.width, columns, width)
    return photo_BCHW[..., top:bottom, left:right]


def _pixels(start: int, length: int, pixels: int, cells: int) -> tuple[int, int]:
    return start * pixels // cells, math.ceil((start + length) * pixels / cells)


def with_global(local: Sequence[str], whole: Sequence[str]) -> list[str]:
    """A tile's own tags, then those of the whole photo that it does not have itself."""
    return list(dict.fromkeys([*local, *whole]))


def nearest(tiles: Sequence[Tile], to: Tile) -> int:
    """Which of the tiles has its centre nearest to that of another one; the first of equally near ones."""
    y, x = _centre(to)
    return min(range(len(tiles)), key=lambda i: math.dist(_centre(tiles[i]), (y, x)))


def _centre(tile: Tile) -> tuple[float, float]:
    return tile.y + tile.height / 2, tile.x + tile.width / 2


@dataclass(frozen=True, kw_only=True)
class TilePrompts:
    """Prompt tensors of P tiles and B pictures, for whatever tiles a sampler has."""

    tiles: tuple[Tile, ...]
    """Where the prompts were read, in latent cells."""
    values: Tensor
    """(P, B, L, D): text states, or soft prompts."""

    def at(self, tiles: Sequence[Tile]) -> Tensor:
        """The prompts (T · B, L, D) for T tiles, tile-major: each takes that of the nearest centre."""
        return torch.cat([self.values[nearest(self.tiles, tile)] for tile in tiles])
