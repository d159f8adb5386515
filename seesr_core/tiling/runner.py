"""Pictures (8 bits) and latents stay on the CPU; what a network needs of them travels to its device and back.

So a device never holds more than a tile, and a picture costs three bytes a pixel however large it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..method.denoiser import Denoiser
from ..method.reuse import Embeddings, StepReuse
from ..pictures.sizes import from_u8, to_u8
from .autoencoder import encoded_latents
from .grid import PIXELS_PER_CELL, Tile, TiledDenoiser
from .prompts import TilePrompts


class PictureVAE(nn.Module):
    """An autoencoder between uint8 pictures (B, 3, H, W) and float32 latents (B, 4, h, w), both on the CPU.

    It has the interface of diffusers' autoencoders that `vae_tiling` uses. Decoded values are rounded to 8 bits, as the
    published implementation does before its colour fix; with `rounds` off they are float32 in [0, 1].
    """

    def __init__(self, vae: Any, device: torch.device, dtype: torch.dtype, *, rounds: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.device = device
        self.dtype = dtype
        self.rounds = rounds

    @property
    def config(self) -> Any:
        """The autoencoder's own configuration."""
        return self.vae.config

    def encode(self, image_u8: Tensor) -> SimpleNamespace:
        """`latents`: the mode of the posterior, not yet scaled."""
        encoded = self.vae.encode((image_u8.to(self.device).float() / 127.5 - 1.0).to(self.dtype))
        return SimpleNamespace(latents=encoded_latents(encoded).float().cpu())

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """`sample`: the picture."""
        decoded = (self.vae.decode(latents.to(device=self.device, dtype=self.dtype)).sample.float() + 1.0) / 2.0
        return SimpleNamespace(sample=(to_u8(decoded) if self.rounds else decoded.clamp(0.0, 1.0)).cpu())


@dataclass(kw_only=True, slots=True)
class PlacedDenoiser:
    """A `TileDenoise` of float32 latents on the CPU that runs a `Denoiser` on its device."""

    denoiser: Denoiser
    """The networks and their prompts, on the device; its `image` is the uint8 picture (B, 3, 8h, 8w) on the CPU."""
    device: torch.device
    """Device that the networks run on."""
    dtype: torch.dtype
    """Precision of the networks' inputs."""
    text: TilePrompts | None = None
    """Text states for each tile, in place of the denoiser's positive ones; they are not used without tiles."""
    soft: TilePrompts | None = None
    """Soft prompts for each tile, likewise."""
    reuse: StepReuse[Any] | None = None
    """What the run keeps of the ControlNet's outputs; None computes them in every step."""
    embeddings: Embeddings | None = None
    """What the run keeps of its image encoder; None asks it in every step."""
    on_call: Callable[[], None] = lambda: None
    """Called after each batch of tiles."""

    def __call__(self, x: Tensor, t: int, tiles: Sequence[Tile] | None = None) -> Tensor:
        """Predicted noise of `x` (B, 4, h, w), or of its tiles stacked tile-major; float32 on the CPU."""
        here = self._here(tiles)
        if self.reuse is not None and here.controlnet is not None:
            here.controlnet = _Reused(here.controlnet, self.reuse, t, tuple(tiles or ()))
        eps = here(self._put(x), t).float().cpu()
        self.on_call()
        return eps

    def _here(self, tiles: Sequence[Tile] | None) -> Denoiser:
        """The denoiser with its inputs for these tiles alone, on the device."""
        whole = self.denoiser
        soft = _prompts(whole.soft_prompt, self.soft, tiles)
        regions = whole.regions.crop(tiles) if whole.regions is not None and tiles else whole.regions
        return replace(
            whole,
            embed=None if self.embeddings is None else partial(self.embeddings, tuple(tiles or ())),
            image=self._put(from_u8(self._pixels(tiles))),
            positive=self._put(_prompts(whole.positive, self.text, tiles)),
            negative=self._put(_prompts(whole.negative, None, tiles)),
            soft_prompt=None if soft is None else self._put(soft),
            regions=None if regions is None else regions.to(self.device),
            share=None if whole.share is None else parts_of(whole.share, tiles).to(self.device),
            hint=None if whole.hint is None else self._put(parts_of(whole.hint, tiles)),
        )

    def _pixels(self, tiles: Sequence[Tile] | None) -> Tensor:
        return parts_of(self.denoiser.image, tiles, PIXELS_PER_CELL)

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)


def with_hint(tiled: TiledDenoiser, hint: Tensor | None) -> TiledDenoiser:
    """The same denoiser, which adds `hint` (B, C, h, w), or its part, to the ControlNet's conditioning embedding."""
    placed = tiled.denoise
    assert isinstance(placed, PlacedDenoiser)
    return replace(tiled, denoise=replace(placed, denoiser=replace(placed.denoiser, hint=hint)))


@dataclass(frozen=True, slots=True)
class _Reused:
    """A ControlNet in one step on these tiles, whose outputs may be those of an earlier step."""

    controlnet: Any
    reuse: StepReuse[Any]
    t: int
    tiles: tuple[Tile, ...]

    @property
    def controlnet_cond_embedding(self) -> nn.Module:
        """Its image encoder, for who adds a hint."""
        encoder: nn.Module = self.controlnet.controlnet_cond_embedding
        return encoder

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # With guidance both halves are in one call, without only one: outputs of the other do not fit.
        return self.reuse(self.t, (self.tiles, len(x)), lambda: self.controlnet(x, *args, **kwargs))


def parts_of(whole: Tensor, tiles: Sequence[Tile] | None, factor: int = 1) -> Tensor:
    """What lies under each tile, stacked tile-major (T·B, …); the whole without tiles."""
    return torch.cat([tile.crop(whole, factor) for tile in tiles]) if tiles else whole


def _prompts(whole: Any, local: TilePrompts | None, tiles: Sequence[Tile] | None) -> Any:
    """The prompts of each tile, tile-major: its own, or the whole picture's again and again."""
    if not tiles or whole is None:
        return whole
    return whole.repeat(len(tiles), 1, 1) if local is None else local.at(tiles)
