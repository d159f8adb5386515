"""Tiled sampling as a patch of a host model: every prediction of a large latent is made in overlapping tiles.

The wrapper sits around the host's `calc_cond_batch`, which every sampler and guider calls with the whole latent. Its
results are clean latents x − sigma·eps; averaging those under a window is averaging eps, as the published code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....seesr_core.errors import SettingsError
from ....seesr_core.tiling.grid import PIXELS_PER_CELL, WINDOWS, Blend, Layout, Tile, Window, lay_out
from .conds import Conds, CondTiler
from .controls import ControlTiler
from .memory import choose_tile_batch, is_out_of_memory

KEY = "seesr_tiles"
MIN_TILE_PX = 64

Predict = Callable[..., list[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TileSettings:
    """How latents are tiled; lengths in latent cells."""

    tile: int = 96
    """Side of a tile; latents of no more cells than one tile are denoised whole."""
    overlap: int = 4
    """Cells that neighbouring tiles share at least."""
    tile_batch: int = 0
    """Tiles denoised in one call; 0 chooses by free memory."""
    window: Window = "reference"
    """How tiles are weighted where they overlap."""
    layout: Layout = "published"
    """How tiles lie: on the published grid, or balanced."""

    def __post_init__(self) -> None:
        if self.tile_batch < 0:
            raise SettingsError(f"tile_batch must be 0 (automatic) or a number of tiles, not {self.tile_batch}.")
        if self.window not in WINDOWS:
            raise SettingsError(f"Unknown window {self.window!r}: choose one of {', '.join(WINDOWS)}.")

    @classmethod
    def from_pixels(
        cls,
        tile_size: int,
        overlap: int,
        *,
        tile_batch: int = 0,
        window: Window = "reference",
        layout: Layout = "published",
    ) -> TileSettings:
        """Settings from lengths in pixels of the result.

        Raises:
            SettingsError: lengths that are no multiples of 8, a tile below 64 pixels, or an overlap as large as it.
        """
        if tile_size < MIN_TILE_PX or tile_size % PIXELS_PER_CELL:
            raise SettingsError(
                f"tile_size must be a multiple of {PIXELS_PER_CELL} and at least {MIN_TILE_PX} pixels, not {tile_size}."
            )
        if overlap < 0 or overlap % PIXELS_PER_CELL:
            raise SettingsError(f"overlap must be a multiple of {PIXELS_PER_CELL} pixels from 0 on, not {overlap}.")
        if overlap >= tile_size:
            raise SettingsError(f"overlap ({overlap} pixels) must be less than tile_size ({tile_size} pixels).")
        tile, shared = tile_size // PIXELS_PER_CELL, overlap // PIXELS_PER_CELL
        return cls(tile=tile, overlap=shared, tile_batch=tile_batch, window=window, layout=layout)

    def grid(self, shape: Sequence[int]) -> list[Tile]:
        """The tiles of latents (B, C, h, w); none if they are denoised whole."""
        return lay_out(shape[2], shape[3], self.tile, self.overlap, self.layout) if len(shape) == 4 else []


def tile_model(model: Any, settings: TileSettings) -> Any:
    """A clone of a MODEL that is sampled in tiles; tiles it already had are replaced."""
    tiled, tiler = model.clone(), Tiler(settings)
    wrappers = {
        WrappersMP.PREPARE_SAMPLING: tiler.prepare_sampling,
        WrappersMP.SAMPLER_SAMPLE: tiler.sampler_sample,
        WrappersMP.CALC_COND_BATCH: tiler.calc_cond_batch,
    }
    for kind, wrapper in wrappers.items():
        tiled.remove_wrappers_with_key(kind, KEY)
        tiled.add_wrapper_with_key(kind, KEY, wrapper)
    return tiled


@dataclass(frozen=True, slots=True)
class Tiler:
    """The wrappers; they hold no state, each run of a sampler has its own."""

    settings: TileSettings

    def prepare_sampling(self, executor: Any, model: Any, noise_shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """Around the loading of the models: memory is needed for tiles, not for the whole latent."""
        grid = self.settings.grid(noise_shape)
        if grid:
            batch, channels = noise_shape[:2]
            at_once = min(self.settings.tile_batch or 1, len(grid))
            noise_shape = [at_once * batch, channels, grid[0].height, grid[0].width]
        return executor(model, noise_shape, *args, **kwargs)

    def sampler_sample(
        self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around a run: what it caches is dropped when it ends, however that is."""
        extra_args["model_options"][KEY] = TiledRun(self.settings)
        try:
            return executor(guider, sigmas, extra_args, *args, **kwargs)
        finally:
            del extra_args["model_options"][KEY]

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Conds, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> list[Tensor]:
        """Around one prediction for all conditionings."""
        grid = self.settings.grid(x.shape)
        if not grid:
            return executor(model, conds, x, timestep, model_options)
        run = model_options.get(KEY) or TiledRun(self.settings)

        def predict(tile_conds: Conds, tiles_x: Tensor, tiles_timestep: Tensor) -> list[Tensor]:
            return executor(model, tile_conds, tiles_x, tiles_timestep, model_options)

        return run.denoise(predict, model, conds, x, timestep, grid)


class TiledRun:
    """One run of a sampler: scaled hints, and how many tiles go at once."""

    def __init__(self, settings: TileSettings) -> None:
        self._settings = settings
        self._at_once = settings.tile_batch
        self._controls = ControlTiler(0, 0)

    def denoise(
        self, predict: Predict, model: Any, conds: Conds, x: Tensor, timestep: Tensor, grid: Sequence[Tile]
    ) -> list[Tensor]:
        """The predictions (B, C, h, w) for each list of conditionings; zero for one that is None."""
        if self._controls.size != tuple(x.shape[-2:]):
            self._controls = ControlTiler(*x.shape[-2:])
        cropper = CondTiler(conds, x, timestep, self._controls)
        needed = [i for i, group in enumerate(conds) if group is not None]
        blends = {i: Blend(x, grid[0], self._settings.window) for i in needed}
        self._at_once = self._at_once or choose_tile_batch(
            model, [len(needed) * len(x), x.shape[1], grid[0].height, grid[0].width], x.device
        )
        for tiles, outputs in self._predictions(predict, cropper, x, timestep, grid):
            for i, blend in blends.items():
                for tile, output in zip(tiles, outputs[i].chunk(len(tiles)), strict=True):
                    blend.add(tile, output)
        return [blends[i].result().to(x.dtype) if i in blends else torch.zeros_like(x) for i in range(len(conds))]

    def _predictions(
        self, predict: Predict, cropper: CondTiler, x: Tensor, timestep: Tensor, grid: Sequence[Tile]
    ) -> Iterator[tuple[list[Tile], list[Tensor]]]:
        for _, alike in groupby(grid, cropper.layout):
            left = list(alike)
            while left:
                comfy.model_management.throw_exception_if_processing_interrupted()
                tiles = left[: self._at_once]
                outputs = self._try(predict, cropper, x, timestep, tiles)
                if outputs is not None:
                    left = left[len(tiles) :]
                    yield tiles, outputs

    def _try(
        self, predict: Predict, cropper: CondTiler, x: Tensor, timestep: Tensor, tiles: list[Tile]
    ) -> list[Tensor] | None:
        """The predictions for `tiles`; None if memory ran out and fewer are to be tried."""
        try:
            return predict(
                cropper.crop(tiles), torch.cat([tile.crop(x) for tile in tiles]), torch.cat([timestep] * len(tiles))
            )
        except Exception as error:
            if len(tiles) == 1 or not is_out_of_memory(error):
                raise
        # Out of the handler, the exception no longer holds on to the memory of the failed call.
        self._at_once = len(tiles) // 2
        comfy.model_management.soft_empty_cache()
        return None
