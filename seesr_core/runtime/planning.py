"""What a run will need, told before it begins: tiles, and memory for pictures and for one tile's networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models import Models
from ..pictures.sizes import Sizes
from ..settings import UpscaleSettings
from ..tiling.grid import PIXELS_PER_CELL, Tile, lay_out
from .memory import require_memory

# Bytes, measured on pictures of 36 megapixels and rounded up.
_LR_PIXEL = 24  # a pixel of the photo: decoded, converted, and as the tagger's float input
_HELD_PIXEL = 6  # a pixel of the prepared picture and of the decoded one
_SIXTEEN_PIXEL = 40  # what a result of 16 bits a channel adds: floats of the decoded picture, the photo and the result
_FINISH_PIXEL = {"none": 14, "adain": 18, "wavelet": 32}  # what the finish adds for one picture
# Feature maps alive at once, in units of the first level's.
_UNET_MAPS = 80
_CONTROL_MAPS = 6  # the ControlNet's residuals, which stay for further steps with `control_reuse`
_VAE_MAPS = 6
_VAE_MARGIN = 160  # pixels of surrounding that a tile of the autoencoder is given on each side


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes that a run takes at its peak, beside the weights."""

    pictures: int
    """All pictures, on the CPU, while the result is finished."""
    held: int
    """Those of them that are kept while the networks run."""
    networks: int
    """Feature maps of the largest call of a network, on its device."""


def require_resources(
    models: Models, settings: UpscaleSettings, sizes: Sizes, *, batch: int = 1, depth: int = 8
) -> None:
    """Refuse a run that will not fit into memory; `depth`: bits a channel of the result.

    Raises:
        ResourceError: with the estimate, what is available, and what to change.
    """
    needs = estimate(models, settings, sizes, batch=batch)
    work = f"Upscaling {_text(sizes.lr)} to {_text(sizes.final)} pixels"
    deep = _SIXTEEN_PIXEL * batch * _area(sizes.prepared) if depth == 16 else 0
    require_memory(needs.pictures + deep, work, "choose a smaller scale or cut the photo into parts")
    advice = "choose smaller tiles (tile, vae_tile)"
    if models.device.type == "cpu":
        require_memory(needs.held + needs.networks, work, advice)
    else:
        require_memory(needs.networks, work, advice, models.device)


def estimate(models: Models, settings: UpscaleSettings, sizes: Sizes, *, batch: int = 1) -> Needs:
    """Needs of a batch of photos of one size."""
    lr, prepared = _area(sizes.lr) * _LR_PIXEL, _area(sizes.prepared)
    held = batch * (lr + prepared * _HELD_PIXEL)
    return Needs(
        pictures=held + prepared * _FINISH_PIXEL[settings.color_fix],
        held=held,
        networks=max(_unet_bytes(models, settings, sizes, batch), _vae_bytes(models, settings, sizes, batch)),
    )


def _unet_bytes(models: Models, settings: UpscaleSettings, sizes: Sizes, batch: int) -> int:
    tiles = tiles_of(*sizes.prepared, settings)
    at_once = min(settings.tile_batch or default_tile_batch(models.device), len(tiles))
    cells = tiles[0].height * tiles[0].width
    copies = batch * max(settings.halves())
    kept = len(tiles) * _CONTROL_MAPS if settings.control_reuse > 1 else 0
    channels = models.unet.config.block_out_channels[0]
    return copies * cells * channels * models.dtype.itemsize * (at_once * _UNET_MAPS + kept)


def _vae_bytes(models: Models, settings: UpscaleSettings, sizes: Sizes, batch: int) -> int:
    widths = models.vae.config.get("encoder_block_out_channels") or models.vae.config.block_out_channels
    tile = settings.vae_tile + 2 * _VAE_MARGIN
    area = min(sizes.prepared[0], tile) * min(sizes.prepared[1], tile)
    return batch * area * widths[0] * models.dtype.itemsize * _VAE_MAPS


def default_tile_batch(device: torch.device) -> int:
    """Tiles denoised at once where the settings leave it open."""
    return 1 if device.type == "cpu" else 4


def count_tiles(width: int, height: int, settings: UpscaleSettings) -> int:
    """How many tiles a prepared picture of width × height pixels is denoised in."""
    return len(tiles_of(width, height, settings))


def tiles_of(width: int, height: int, settings: UpscaleSettings) -> list[Tile]:
    """The tiles, in latent cells, that a prepared picture of width × height pixels is denoised in; one if whole."""
    rows, columns = height // PIXELS_PER_CELL, width // PIXELS_PER_CELL
    tile, overlap = settings.tile // PIXELS_PER_CELL, settings.overlap // PIXELS_PER_CELL
    return lay_out(rows, columns, tile, overlap, settings.layout) or [Tile(0, 0, rows, columns)]


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
