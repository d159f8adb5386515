"""Pictures (8 bits) and latents stay on the CPU; what a network needs of them travels to its device and back.

So a device never holds more than a tile, and a picture costs three bytes a pixel however large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..method.denoiser import Denoiser
from ..pictures.sizes import from_u8, to_u8
from .autoencoder import encoded_latents
from .grid import PIXELS_PER_CELL, Tile


class PictureVAE(nn.Module):
    """An autoencoder between uint8 pictures (B, 3, H, W) and float32 latents (B, 4, h, w), both on the CPU.

    It has the interface of diffusers' autoencoders that `vae_tiling` uses. Decoded values are rounded to 8 bits, as the
    published implementation does before its colour fix.
    """

    def __init__(self, vae: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae = vae
        self.device = device
        self.dtype = dtype

    @property
    def config(self) -> Any:
        """The autoencoder's own configuration."""
        return self.vae.config

    def encode(self, image_u8: Tensor) -> SimpleNamespace:
        """`latents`: the mode of the posterior, not yet scaled."""
        encoded = self.vae.encode((image_u8.to(self.device).float() / 127.5 - 1.0).to(self.dtype))
        return SimpleNamespace(latents=encoded_latents(encoded).float().cpu())

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """`sample`: the picture in 8 bits."""
        decoded = self.vae.decode(latents.to(device=self.device, dtype=self.dtype)).sample.float()
        return SimpleNamespace(sample=to_u8((decoded + 1.0) / 2.0).cpu())


@dataclass(kw_only=True, slots=True)
class PlacedDenoiser:
    """A `TileDenoise` of float32 latents on the CPU that runs a `Denoiser` on its device."""

    denoiser: Denoiser
    """The networks and their prompts, on the device; its `image` is the uint8 picture (B, 3, 8h, 8w) on the CPU."""
    device: torch.device
    """Device that the networks run on."""
    dtype: torch.dtype
    """Precision of the networks' inputs."""
    on_call: Callable[[], None] = lambda: None
    """Called after each batch of tiles."""

    def __call__(self, x: Tensor, t: int, tiles: Sequence[Tile] | None = None) -> Tensor:
        """Predicted noise of `x` (B, 4, h, w), or of its tiles stacked tile-major; float32 on the CPU."""
        eps = self._here(tiles)(self._put(x), t).float().cpu()
        self.on_call()
        return eps

    def _here(self, tiles: Sequence[Tile] | None) -> Denoiser:
        """The denoiser with its inputs for these tiles alone, on the device."""
        whole, copies = self.denoiser, len(tiles) if tiles else 1
        soft = whole.soft_prompt
        return replace(
            whole,
            image=self._put(from_u8(self._pixels(tiles))),
            positive=self._put(whole.positive.repeat(copies, 1, 1)),
            negative=self._put(whole.negative.repeat(copies, 1, 1)),
            soft_prompt=None if soft is None else self._put(soft.repeat(copies, 1, 1)),
        )

    def _pixels(self, tiles: Sequence[Tile] | None) -> Tensor:
        """The picture under each tile, stacked tile-major (T·B, 3, 8·th, 8·tw); the whole one without tiles."""
        whole = self.denoiser.image
        return torch.cat([tile.crop(whole, PIXELS_PER_CELL) for tile in tiles]) if tiles else whole

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)
