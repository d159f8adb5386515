"""What a run will need, told before it begins."""

from __future__ import annotations

import torch

from .denoiser import PIXELS_PER_LATENT
from .image import Sizes
from .memory import require_memory
from .models import Models
from .settings import UpscaleSettings
from .tiling import tile_grid

_LR_BYTES = 24
_PICTURE_BYTES = 26


def require_resources(models: Models, settings: UpscaleSettings, sizes: Sizes, *, batch: int = 1) -> None:
    pass


def default_tile_batch(device: torch.device) -> int:
    """Tiles denoised at once where the settings leave it open."""
    return 1 if device.type == "cpu" else 4


def count_tiles(width: int, height: int, settings: UpscaleSettings) -> int:
    """How many tiles a prepared picture of width × height pixels is denoised in."""
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    tile, overlap = settings.tile // PIXELS_PER_LATENT, settings.overlap // PIXELS_PER_LATENT
    return 1 if rows * columns <= tile * tile else len(tile_grid(rows, columns, tile, overlap))
