"""Prompts with areas: their ControlNets of ours are shown the area's part of the photo.

The host would squeeze the whole hint into the area, which suits a pose drawn for it but not the photo itself.
"""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...seesr_core.tiling.grid import PIXELS_PER_CELL, Tile
from .control import SeeSRControl, chain
from .tiling.conds import Cond, Conds, CondTiler
from .tiling.controls import ControlTiler
from .tiling.tiles import KEY as TILES


def cut_areas(
    executor: Any, model: Any, conds: Conds, x: Tensor, timestep: Tensor, model_options: dict[str, Any]
) -> list[Tensor]:
    """Around one prediction for all conditionings (`WrappersMP.CALC_COND_BATCH`) on latents `x` (B, 4, h, w)."""
    squeezed = any(_is_squeezed(cond, x) for group in conds for cond in group or ())
    if squeezed and not _will_be_tiled(x, model_options):
        whole = Tile(0, 0, *x.shape[-2:])
        conds = CondTiler(conds, x, timestep, ControlTiler(*x.shape[-2:])).crop([whole])
    return executor(model, conds, x, timestep, model_options)


def _is_squeezed(cond: Cond, x: Tensor) -> bool:
    """Whether a conditioning has an area and a hint that covers all of `x`; around tiles hints are cut already."""
    pixels = tuple(PIXELS_PER_CELL * side for side in x.shape[-2:])
    ours = (link for link in chain(cond.get("control")) if isinstance(link, SeeSRControl))
    return "area" in cond and any(tuple(link.cond_hint_original.shape[-2:]) == pixels for link in ours)


def _will_be_tiled(x: Tensor, model_options: dict[str, Any]) -> bool:
    """Whether tiles come after this wrapper; they see to areas themselves."""
    wrappers = comfy.patcher_extension.get_wrappers_with_key(
        WrappersMP.CALC_COND_BATCH, TILES, model_options, is_model_options=True
    )
    return any(wrapper.__self__.settings.grid(x.shape) for wrapper in wrappers)
