"""Pictures into latents and back with the host's autoencoder, in tiles where the picture is large."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
from torch import Tensor, nn

from ...seesr_core.errors import ImageError, SettingsError
from ...seesr_core.tiling.autoencoder import decode_tiled, encode_tiled
from ...seesr_core.tiling.grid import PIXELS_PER_CELL
from ..schema import channels_first, require_finite, view_channels_first

LARGE_PIXELS = 1536 * 1536
"""Pictures with more pixels are encoded and decoded in tiles."""
TILE_PX = 1024
"""Side of a tile, without the surrounding that its convolutions see."""


def encode_image(model: Any, vae: Any, image_BHWC: Tensor) -> Tensor:
    """Unscaled latents (B, 4, H/8, W/8) of pictures for `model`: the mode of the autoencoder's posterior.

    Raises:
        ImageError: sides that are no multiples of 8, no colour picture, or values that are not numbers.
        SettingsError: the autoencoder makes other latents than the model takes.
    """
    channels = model.get_model_object("latent_format").latent_channels
    check_vae(vae, channels)
    height, width = _checked_size(image_BHWC)
    pixels_BHWC = channels_first(image_BHWC).movedim(1, -1)
    if height * width > LARGE_PIXELS:
        samples = encode_tiled(_InTiles(vae), pixels_BHWC.movedim(-1, 1), tile_px=TILE_PX)
    else:
        samples = vae.encode(pixels_BHWC)
    _check_latents(samples, (channels, height // PIXELS_PER_CELL, width // PIXELS_PER_CELL))
    return samples


def decode_latent(vae: Any, samples: Tensor) -> Tensor:
    """Pictures (B, 8h, 8w, 3) of unscaled latents (B, C, h, w): what VAE Decode gives, in one pass of tiles if large.

    Raises:
        SettingsError: an autoencoder of another kind.
    """
    check_vae(vae, samples.shape[1])
    height, width = samples.shape[-2:]
    if height * width * PIXELS_PER_CELL**2 <= LARGE_PIXELS:
        return vae.decode(samples)
    return decode_tiled(_InTiles(vae), samples, tile_px=TILE_PX).movedim(1, -1)


class _InTiles(nn.Module):
    """The host's autoencoder as the core's tiling calls one; loading, device and precision stay the host's.

    The host's own tilers run over the picture three times, with tiles of three shapes, to hide their seams.
    """

    config = SimpleNamespace(scaling_factor=1.0)
    pixels_per_cell = PIXELS_PER_CELL

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.network = vae.first_stage_model
        self._vae = vae

    def encode(self, image_B3HW: Tensor) -> SimpleNamespace:
        """`latents` (B, C, H/8, W/8), unscaled, of pictures in [0, 1]."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return SimpleNamespace(latents=self._vae.encode(image_B3HW.movedim(1, -1)))

    def decode(self, latents_BChw: Tensor) -> SimpleNamespace:
        """`sample`: pictures (B, 3, 8h, 8w) in [0, 1]."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return SimpleNamespace(sample=self._vae.decode(latents_BChw).movedim(-1, 1))


def check_vae(vae: Any, channels: int) -> None:
    """Raise SettingsError unless the autoencoder makes so many channels of pictures an eighth as wide and high."""
    # Other plugins' autoencoders may lack what the host's have; the shape of their latents tells later.
    factor = getattr(vae, "spacial_compression_encode", lambda: PIXELS_PER_CELL)()
    found = (getattr(vae, "latent_channels", channels), factor, getattr(vae, "latent_dim", 2))
    if found != (channels, PIXELS_PER_CELL, 2):
        raise SettingsError(
            f"Expected a VAE that makes pictures {PIXELS_PER_CELL} times smaller with {channels} channels, found one "
            f"that makes {found[2]}-dimensional latents {found[1]} times smaller with {found[0]} channels; connect the "
            "VAE of the model's own checkpoint."
        )


def _checked_size(image_BHWC: Tensor) -> tuple[int, int]:
    height, width = view_channels_first(image_BHWC).shape[-2:]
    if height % PIXELS_PER_CELL or width % PIXELS_PER_CELL:
        raise ImageError(
            f"Expected a picture with sides that are multiples of {PIXELS_PER_CELL}, found {width}×{height}; connect "
            "SeeSR Prepare Image."
        )
    require_finite(image_BHWC, "The picture", "check the node it comes from", ImageError)
    return height, width


def _check_latents(samples: Tensor, size: tuple[int, int, int]) -> None:
    if samples.ndim != 4 or samples.shape[1:] != size:
        raise SettingsError(
            f"The VAE makes latents of shape {tuple(samples.shape[1:])}, the MODEL takes {size}; connect "
            "the VAE of the model's own checkpoint."
        )
    require_finite(
        samples,
        "What the VAE encoded",
        "it does not work in this precision: start the host with --fp32-vae or choose another VAE",
    )
