"""Tiled denoising: integer tile geometry, the gaussian blending window, and a denoiser that runs tile by tile.

All lengths are in latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import SettingsError

Window = Literal["reference", "symmetric"]
WINDOWS: tuple[Window, ...] = ("reference", "symmetric")
Layout = Literal["published", "balanced"]
LAYOUTS: tuple[Layout, ...] = ("published", "balanced")

PIXELS_PER_CELL = 8
"""Pixels of the picture along a side of a latent cell: the autoencoder's, and the ControlNet's image encoder's."""

_WINDOW_VARIANCE = 0.01
_ALIGN = 8
"""Cells that the U-Net's deepest level sees as one; balanced tiles are multiples of it, so that none is padded."""


class Tile(NamedTuple):
    """A part of a latent: rows y … y + height, columns x … x + width."""

    y: int
    x: int
    height: int
    width: int

    def crop(self, tensor: Tensor, factor: int = 1) -> Tensor:
        """The tile's part of a tensor (…, h·factor, w·factor), a view; factor 8 for pictures."""
        y, x, height, width = (length * factor for length in self)
        return tensor[..., y : y + height, x : x + width]

    def intersection(self, other: Tile) -> Tile | None:
        """What both cover; None if nothing."""
        y, x = max(self.y, other.y), max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - y
        width = min(self.x + self.width, other.x + other.width) - x
        return Tile(y, x, height, width) if height > 0 and width > 0 else None

    def grown(self, least: int, within: Tile) -> Tile:
        """This part, which lies `within` another, with sides of at least `least` cells as far as that one reaches."""
        y, height = _grown(self.y, self.height, least, within.y, within.height)
        x, width = _grown(self.x, self.width, least, within.x, within.width)
        return Tile(y, x, height, width)

    def relative_to(self, other: Tile) -> Tile:
        """This part, counted from the corner of `other`."""
        return Tile(self.y - other.y, self.x - other.x, self.height, self.width)


def _grown(start: int, length: int, least: int, first: int, space: int) -> tuple[int, int]:
    least = min(max(length, least), space)
    start = start - (least - length) // 2
    return min(max(start, first), first + space - least), least


class TileDenoise(Protocol):
    """Predicts noise for a whole latent (`tiles` None) or for a batch of its tiles.

    With n tiles of B latents `x` is (n·B, 4, height, width), tile-major: first the first tile of all B latents.
    """

    def __call__(self, x: Tensor, t: int, tiles: Sequence[Tile] | None = None) -> Tensor: ...


def tile_offsets(size: int, tile: int, overlap: int) -> list[int]:
    """Starts of the tiles along one side: every `tile − overlap`, the last one flush with the border.

    Raises:
        SettingsError: the overlap is negative or not smaller than the tile, or the tile is empty.
    """
    check_tile(tile, overlap)
    last = max(size - tile, 0)
    return [*range(0, last, tile - overlap), last]


def check_tile(tile: int, overlap: int) -> None:
    """Raise SettingsError unless 0 ≤ overlap < tile."""
    if tile < 1:
        raise SettingsError(f"The tile must be at least 1 latent cell (8 pixels), not {tile}.")
    if not 0 <= overlap < tile:
        raise SettingsError(f"The overlap ({overlap} latent cells) must be from 0 to less than the tile ({tile}).")


def tile_grid(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    """Square tiles that cover a latent of height × width, column by column (x outer, y inner), as published.

    A side shorter than the tile shrinks all tiles to that side; an overlap that no longer fits becomes half a tile.
    """
    check_tile(tile, overlap)
    size = min(tile, height, width)
    if overlap >= size:
        overlap = size // 2
    rows = tile_offsets(height, size, overlap)
    return [Tile(y, x, size, size) for x in tile_offsets(width, size, overlap) for y in rows]


def balanced_grid(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    """As many equal tiles as sides of at most `tile` cells need, no larger than they must be, evenly spread.

    Neighbours share at least `overlap` cells. Where the published grid ends with a tile that lies nearly on the one
    before it, these are smaller instead: 128 × 128 cells in tiles of at most 96 are four of 72 and not four of 96.
    A side that fits into a tile is not cut, so that tiles need not be square.
    """
    check_tile(tile, overlap)
    (tall, rows), (wide, columns) = (_balanced_side(side, tile, overlap) for side in (height, width))
    return [Tile(y, x, tall, wide) for x in columns for y in rows]


def _balanced_side(side: int, tile: int, overlap: int) -> tuple[int, list[int]]:
    """Length and starts of the tiles along one side."""
    if side <= tile:
        return side, [0]
    count = -(-(side - overlap) // (tile - overlap))
    least = -(-(side + (count - 1) * overlap) // count)
    length = min(-(-least // _ALIGN) * _ALIGN, tile)
    return length, [i * (side - length) // (count - 1) for i in range(count)]


def fits_one_tile(height: int, width: int, tile: int) -> bool:
    """Whether a latent is denoised whole: it has no more cells than one tile, as published."""
    return height * width <= tile * tile


def lay_out(height: int, width: int, tile: int, overlap: int, layout: Layout = "published") -> list[Tile]:
    """The equal tiles that a latent of height × width is denoised in; none if it is denoised whole.

    "published" is `tile_grid`, "balanced" is `balanced_grid`.

    Raises:
        SettingsError: a tile or an overlap that cannot be, or an unknown layout.
    """
    if layout not in LAYOUTS:
        raise SettingsError(f"Unknown tile layout {layout!r}: choose one of {', '.join(LAYOUTS)}.")
    check_tile(tile, overlap)
    if fits_one_tile(height, width, tile):
        return []
    return (balanced_grid if layout == "balanced" else tile_grid)(height, width, tile, overlap)


def gaussian_window(height: int, width: int, window: Window = "reference") -> Tensor:
    """Blending weights of a tile, float64 (height, width): separable gaussians of variance 0.01 in units of the tile.

    "reference" is centred at (width − 1) / 2 across but height / 2 down, as the published implementation; "symmetric"
    is centred both ways.

    Raises:
        SettingsError: unknown window.
    """
    if window not in WINDOWS:
        raise SettingsError(f"Unknown tile window {window!r}: choose one of {', '.join(WINDOWS)}.")
    centre = height / 2 if window == "reference" else (height - 1) / 2
    return torch.outer(_gaussian(height, centre), _gaussian(width, (width - 1) / 2))


def _gaussian(size: int, centre: float) -> Tensor:
    offset = (torch.arange(size, dtype=torch.float64) - centre) / size
    return torch.exp(-(offset**2) / (2 * _WINDOW_VARIANCE)) / (2 * torch.pi * _WINDOW_VARIANCE) ** 0.5


class Blend:
    """Predictions of equal tiles, averaged under a window into a whole; sums run in float32.

    Args:
        like: a tensor of the whole's shape (B, C, h, w).
        tile: one of the tiles.
        window: how they are weighted, see `gaussian_window`.
    """

    def __init__(self, like: Tensor, tile: Tile, window: Window = "reference") -> None:
        weights = gaussian_window(tile.height, tile.width, window)
        self._weights = weights.to(device=like.device, dtype=torch.float32)
        self._total = torch.zeros_like(like, dtype=torch.float32)
        self._weight_sum = torch.zeros(like.shape[-2:], device=like.device)

    def add(self, tile: Tile, prediction: Tensor) -> None:
        """Lay down the prediction (B, C, height, width) of a tile."""
        tile.crop(self._total).add_(prediction.float() * self._weights)
        tile.crop(self._weight_sum).add_(self._weights)

    def result(self) -> Tensor:
        """The average, float32; every cell must lie in some tile."""
        return self._total / self._weight_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class TiledDenoiser:
    """A denoiser of latents too large for one pass: predictions of overlapping tiles, averaged under a window."""

    denoise: TileDenoise
    """Predicts the noise of tiles; told where they lie, so that it can crop its conditioning image."""
    tile: int = 96
    """Side of a tile in latent cells; a latent of no more cells than one tile is denoised whole."""
    overlap: int = 4
    """Cells that neighbouring tiles share, less than `tile`."""
    tile_batch: int = 1
    """Tiles denoised in one call."""
    window: Window = "reference"
    """How tiles are weighted where they overlap, see `gaussian_window`."""
    layout: Layout = "published"
    """How tiles lie, see `lay_out`."""

    def __post_init__(self) -> None:
        check_tile(self.tile, self.overlap)
        if self.tile_batch < 1:
            raise SettingsError(f"The number of tiles per call must be at least 1, not {self.tile_batch}.")
        if self.window not in WINDOWS:
            raise SettingsError(f"Unknown tile window {self.window!r}: choose one of {', '.join(WINDOWS)}.")
        if self.layout not in LAYOUTS:
            raise SettingsError(f"Unknown tile layout {self.layout!r}: choose one of {', '.join(LAYOUTS)}.")

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """Predicted noise of `x` (B, 4, h, w) at timestep `t`, same shape and dtype; sums run in float32."""
        height, width = x.shape[-2:]
        grid = lay_out(height, width, self.tile, self.overlap, self.layout)
        if not grid:
            return self.denoise(x, t, None)
        blend = Blend(x, grid[0], self.window)
        for tile, eps in self._predictions(x, t, grid):
            blend.add(tile, eps)
        return blend.result().to(x.dtype)

    def _predictions(self, x: Tensor, t: int, grid: Sequence[Tile]) -> Iterator[tuple[Tile, Tensor]]:
        for first in range(0, len(grid), self.tile_batch):
            tiles = grid[first : first + self.tile_batch]
            eps = self.denoise(torch.cat([tile.crop(x) for tile in tiles]), t, tiles)
            yield from zip(tiles, eps.chunk(len(tiles)), strict=True)
