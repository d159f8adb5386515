"""ControlNets on tiles: copies of the host's objects whose hints are cut to where the network looks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ....seesr_core.tiling.grid import Tile


class ControlTiler:
    """Cuts the hints of ControlNet chains, for one run of a sampler.

    The host's objects are never changed: shallow copies share their weights, and what a copy caches goes with it.
    """

    def __init__(self, height: int, width: int) -> None:
        """Cut controls for latents of height × width cells, which their hints cover whole."""
        self.size = (height, width)
        self._full: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}

    def crop(self, control: Any, parts: Sequence[Tile], batch: int) -> Any:
        """A copy of `control` and the chain before it, for the `parts` of `batch` latents each, tile-major."""
        twin = copy.copy(control)
        twin.parts = tuple(parts)  # which ControlNets of ours ask for
        twin.cond_hint = None  # with it goes what adapters keep of its features
        if _is_picture(control.cond_hint_original):
            twin.cond_hint_original = self._parts(control, control.cond_hint_original, parts, batch)
        if getattr(control, "extra_concat_orig", None):
            twin.extra_concat = None
            twin.extra_concat_orig = [
                self._parts(control, extra, parts, batch) if _is_picture(extra) else extra
                for extra in control.extra_concat_orig
            ]
        if control.previous_controlnet is not None:
            twin.previous_controlnet = self.crop(control.previous_controlnet, parts, batch)
        clones = getattr(control, "multigpu_clones", {})
        twin.multigpu_clones = {device: self.crop(clone, parts, batch) for device, clone in clones.items()}
        return twin

    def _parts(self, control: Any, picture: Tensor, parts: Sequence[Tile], batch: int) -> Tensor:
        full = self._scaled(control, picture)
        factor = full.shape[-1] // self.size[1]
        # Cut first: a copy of the whole picture for each image would not be bounded by the tile.
        return torch.cat([comfy.utils.repeat_to_batch_size(part.crop(full, factor), batch) for part in parts])

    def _scaled(self, control: Any, picture: Tensor) -> Tensor:
        """The picture at the size at which the host would show it to the network for the whole latent."""
        factor = _pixels_per_cell(control)
        height, width = (side * factor for side in self.size)
        if tuple(picture.shape[-2:]) == (height, width):
            return picture
        key = (id(picture), factor, control.upscale_algorithm)
        if key not in self._full:
            scaled = comfy.utils.common_upscale(picture, width, height, control.upscale_algorithm, "center")
            self._full[key] = (picture, scaled)  # the picture as well, lest its id is given to another
        return self._full[key][1]


def _is_picture(value: Any) -> bool:
    """A hint or mask that covers the latent; the host also passes constants of one pixel."""
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:].numel() > 1


def _pixels_per_cell(control: Any) -> int:
    vae = getattr(control, "vae", None)
    return int(control.compression_ratio * (vae.spacial_compression_encode() if vae is not None else 1))
