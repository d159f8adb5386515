"""Conditionings on tiles: model inputs, masks and areas cut to the tiles of one call.

A conditioning is the host's dict at the time of sampling: masks have the latent's size, areas are in latent cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import comfy.conds
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ....seesr_core.tiling.grid import Tile
from ..local import CONDPerTile, text_of_tiles
from .controls import ControlTiler

Cond = dict[str, Any]
Conds = list[list[Cond] | None]
"""The host's argument: a list each for positive, negative and so on; None for one that is not needed."""

_LEAST_SIDE = 8
"""Parts of an area that are smaller are grown into their tile: the network halves its input three times."""


class CondTiler:
    """Cuts the conditionings of one call on latents `x` (B, C, h, w)."""

    def __init__(self, conds: Conds, x: Tensor, timestep: Tensor, controls: ControlTiler) -> None:
        self._controls = controls
        self._batch, _, self._height, self._width = x.shape
        self._regions = [[_Region.of(cond, x, timestep) for cond in group or ()] for group in conds]
        self._conds = conds

    def layout(self, tile: Tile) -> tuple[Tile | None, ...]:
        """Where the areas lie in the tile; only tiles of the same layout can share a call."""
        parts = [region.part(tile) for group in self._regions for region in group]
        return tuple(part and part.relative_to(tile) for part in parts)

    def crop(self, tiles: Sequence[Tile]) -> Conds:
        """The conditionings for `tiles` of one layout, tile-major; those that weigh nothing there are left out."""
        twins: dict[Any, Any] = {}
        return [
            None if group is None else list(self._group(group, regions, tiles, twins))
            for group, regions in zip(self._conds, self._regions, strict=True)
        ]

    def _group(
        self, group: list[Cond], regions: list[_Region], tiles: Sequence[Tile], twins: dict[Any, Any]
    ) -> list[Cond]:
        cropped = (self._cond(cond, region, tiles, twins) for cond, region in zip(group, regions, strict=True))
        return [cond for cond in cropped if cond is not None]

    def _cond(self, cond: Cond, region: _Region, tiles: Sequence[Tile], twins: dict[Any, Any]) -> Cond | None:
        parts = [region.part(tile) for tile in tiles]
        if None in parts:
            return None
        cropped = {**cond, **region.crop(tiles)}
        if "mask" in cropped and not cropped["mask"].any():
            return None
        cropped["model_conds"] = {name: self._input(value, tiles) for name, value in cond["model_conds"].items()}
        text = text_of_tiles(cond, tiles, self._batch) if self._are_tiles(tiles) else None
        if text is not None:
            cropped["model_conds"]["c_crossattn"] = text
        if cond.get("control") is not None:
            cropped["control"] = self._control(cond["control"], parts, twins)
        return cropped

    def _are_tiles(self, tiles: Sequence[Tile]) -> bool:
        """Whether these are parts of the latent rather than the whole of it."""
        return (tiles[0].height, tiles[0].width) != (self._height, self._width)

    def _control(self, control: Any, parts: Sequence[Tile | None], twins: dict[Any, Any]) -> Any:
        """One copy for all that share a ControlNet and look at the same parts: the host batches only those."""
        key = (id(control), *parts)
        if key not in twins:
            twins[key] = self._controls.crop(control, [part for part in parts if part is not None], self._batch)
        return twins[key]

    def _input(self, value: Any, tiles: Sequence[Tile]) -> Any:
        """A model input of the whole latent for its tiles: cut if it has the latent's shape, else once per tile."""
        if isinstance(value, CONDPerTile) and self._are_tiles(tiles):
            return value.on_tiles(tiles, self._batch)
        if isinstance(value, comfy.conds.CONDConstant) or not hasattr(value, "cond"):
            return value
        images = value.process_cond(batch_size=self._batch, area=None)
        if isinstance(images.cond, list):
            return _with_cond(images, [_once_per_tile(entry, len(tiles)) for entry in images.cond])
        if isinstance(value, comfy.conds.CONDNoiseShape) and images.cond.shape[-2:] == (self._height, self._width):
            return _with_cond(images, torch.cat([tile.crop(images.cond) for tile in tiles]))
        return _with_cond(images, _once_per_tile(images.cond, len(tiles)))


def _with_cond(images: Any, cond: Any) -> Any:
    """The host's model input with other contents."""
    changed = copy(images)
    changed.cond = cond
    return changed


def _once_per_tile(tensor: Tensor, tiles: int) -> Tensor:
    return tensor.repeat(tiles, *[1] * (tensor.ndim - 1))


class _Region:
    """Where a conditioning acts, and how strongly: its mask and area as weights over the whole latent."""

    def __init__(self, area: Tile | None, weights_BHW: Tensor | None) -> None:
        self._area = area
        self._weights = weights_BHW

    @classmethod
    def of(cls, cond: Cond, x: Tensor, timestep: Tensor) -> _Region:
        """The region of `cond` on latents `x` (B, C, h, w)."""
        placed: Cond = {key: cond[key] for key in ("area", "mask", "mask_strength") if key in cond}
        if "area" not in placed and "mask" not in placed:
            return cls(None, None)
        # The host works out clipped areas, their soft edges and the masks; strength and windows stay with the tiles.
        bare = {**placed, "model_conds": {}, "uuid": None}
        found = comfy.samplers.get_area_and_mult(bare, x[:, :1], timestep)
        whole = Tile(0, 0, *x.shape[-2:])
        area = whole if found.area is None else Tile(found.area[2], found.area[3], found.area[0], found.area[1])
        weights = x.new_zeros(len(x), whole.height, whole.width)
        area.crop(weights).copy_(found.mult[:, 0])
        return cls(None if found.area is None else area, weights)

    def part(self, tile: Tile) -> Tile | None:
        """The part of the tile that the network is shown; None if the region does not reach into it."""
        if self._area is None:
            return tile
        shared = self._area.intersection(tile)
        return shared and shared.grown(_LEAST_SIDE, tile)

    def crop(self, tiles: Sequence[Tile]) -> Cond:
        """`area` and `mask` as the host is to see them on these tiles, whose layout is the same."""
        if self._weights is None:
            return {}
        cropped: Cond = {"mask": torch.cat([tile.crop(self._weights) for tile in tiles]), "mask_strength": 1.0}
        part = self.part(tiles[0])
        if self._area is not None and part is not None:
            inside = part.relative_to(tiles[0])
            cropped["area"] = (inside.height, inside.width, inside.y, inside.x)
        return cropped
