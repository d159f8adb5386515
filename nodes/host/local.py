"""Prompts per tile in the host: what a tile reads in its own part of the photo, carried to the tiles of a sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...seesr_core.errors import SettingsError
from ...seesr_core.tiling.grid import PIXELS_PER_CELL, Tile
from ...seesr_core.tiling.prompts import TilePrompts

TEXT = "seesr_tile_text"
"""Under which an entry of a CONDITIONING carries text states for each tile (`TilePrompts`)."""
KEY = "seesr_tile_soft"
"""Under which a MODEL carries our wrapper."""
SOFT = "seesr_soft_prompt"
"""Input of a model under which the soft prompts of a call travel."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TileSoftPrompt:
    """A SEESR_SOFT_PROMPT with further ones for each tile."""

    tokens: Tensor
    """(B, L, D) of the whole photos, for samplers without tiles."""
    tiles: TilePrompts
    """Those of the tiles."""
    size: tuple[int, int]
    """Rows and columns of the latent that the tiles lie in."""


def split_soft_prompts(given: Sequence[Any]) -> tuple[list[Tensor], TileSoftPrompt | None]:
    """Soft prompts of whole photos, and those per tile if there are any, of what SeeSR Apply was given.

    Raises:
        SettingsError: prompts per tile beside others; their batch is made in one go.
    """
    local = [entry for entry in given if isinstance(entry, TileSoftPrompt)]
    if local and len(given) > 1:
        raise SettingsError(
            f"SeeSR Apply got {len(given)} soft prompts, some of them per tile; expected a single one for the whole "
            "batch: give SeeSR Tile Prompts all photos at once."
        )
    return [entry.tokens if isinstance(entry, TileSoftPrompt) else entry for entry in given], next(iter(local), None)


class CONDPerTile(comfy.conds.CONDRegular):
    """A model's input that is another one for each tile; what the host itself sees is that of the whole photo."""

    def __init__(self, cond: Tensor, tiles: TilePrompts | None = None) -> None:
        super().__init__(cond)
        self.tiles = tiles

    def on_tiles(self, tiles: Sequence[Tile], batch: int) -> comfy.conds.CONDRegular:
        """The input for tiles of `batch` latents each, tile-major."""
        return comfy.conds.CONDRegular(rows_of_tiles(self.tiles, tiles, batch))


def rows_of_tiles(prompts: TilePrompts | None, tiles: Sequence[Tile], batch: int) -> Tensor:
    """Prompts (T · batch, L, D) of tiles, tile-major, the photos repeated to `batch`."""
    assert prompts is not None
    return torch.cat([comfy.utils.repeat_to_batch_size(prompts.at([tile]), batch) for tile in tiles])


def attach_tile_soft_prompts(model: Any, soft: TileSoftPrompt | None, image_size: Sequence[int]) -> None:
    """Let `model` (already a clone) give each tile its own soft prompt, in place of any it had.

    Raises:
        SettingsError: prompts of tiles in a picture of another size than the prepared one, (height, width) in pixels.
    """
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    if soft is None:
        return
    expected = tuple(PIXELS_PER_CELL * side for side in soft.size)
    if tuple(image_size) != expected:
        raise SettingsError(
            f"The soft prompts per tile are of a picture of {expected[1]} × {expected[0]} pixels, the prepared image "
            f"has {image_size[1]} × {image_size[0]}; give SeeSR Tile Prompts and SeeSR Apply the same prepared image."
        )

    def around_run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        for group in executor.class_obj.conds.values():
            for entry in group:
                tokens = CONDPerTile(soft.tokens, soft.tiles)
                entry["model_conds"] = {**entry.get("model_conds", {}), SOFT: tokens}
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_run)


def check_tile_texts(prompts: Sequence[Any], image_size: Sequence[int]) -> None:
    """Refuse texts per tile of a picture of another size than (height, width).

    Raises:
        SettingsError: they are.
    """
    for _, extras in (entry for prompt in prompts for entry in prompt):
        tiles = extras[TEXT].tiles if TEXT in extras else ()
        ends = [(tile.y + tile.height, tile.x + tile.width) for tile in tiles]
        reach = tuple(PIXELS_PER_CELL * max(sides) for sides in zip(*ends, strict=True))
        if tiles and reach != tuple(image_size):
            raise SettingsError(
                f"The prompts per tile are of a picture of {reach[1]} × {reach[0]} pixels, the prepared image has "
                f"{image_size[1]} × {image_size[0]}; give SeeSR Tile Prompts and SeeSR Apply the same prepared image."
            )


def text_of_tiles(cond: Mapping[str, Any], tiles: Sequence[Tile], batch: int) -> Any:
    """The text input of an entry for some tiles of a latent; None where it has none of its own."""
    if TEXT not in cond:
        return None
    rows = rows_of_tiles(cond[TEXT], tiles, batch)
    return comfy.conds.CONDCrossAttn(rows.to(cond["model_conds"]["c_crossattn"].cond))


def join_tile_texts(entries: Sequence[Sequence[Any]], length: int, name: str) -> TilePrompts | None:
    """Texts per tile of one batched entry from those of single photos, repeated to `length` tokens; None without any.

    Raises:
        SettingsError: some have none, or their tiles or lengths differ.
    """
    found = [extras.get(TEXT) for _, extras in entries]
    if not any(found):
        return None
    if not all(found) or len({own.tiles for own in found}) > 1 or any(length % own.values.shape[2] for own in found):
        raise SettingsError(
            f"The {name} prompts of the photos have different tiles, so they make no batch; give SeeSR Tile Prompts "
            "all photos at once, or run them one at a time."
        )
    values = [own.values.repeat(1, 1, length // own.values.shape[2], 1) for own in found]
    return TilePrompts(tiles=found[0].tiles, values=torch.cat(values, 1))
