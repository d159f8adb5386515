"""The host's autoencoder on large pictures, in one pass of tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .locate import plugin
from .nets import LATENT_CHANNELS


class SpyVAE:
    """Remembers the sizes that go through it at once."""

    latent_channels, latent_dim = LATENT_CHANNELS, 2

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.first_stage_model = torch.nn.Identity()

    def spacial_compression_encode(self) -> int:
        """Pixels a cell, as the host asks for them."""
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        """Zeros of a latent's shape."""
        self.calls.append(("encode", *pixels.shape[1:3]))
        return torch.zeros(len(pixels), LATENT_CHANNELS, pixels.shape[1] // 8, pixels.shape[2] // 8)

    def decode(self, samples: Tensor) -> Tensor:
        """Zeros of a picture's shape."""
        self.calls.append(("decode", 8 * samples.shape[2], 8 * samples.shape[3]))
        return torch.zeros(len(samples), 8 * samples.shape[2], 8 * samples.shape[3], 3)


@pytest.mark.parametrize(("side", "pieces"), [(1536, [(1536, 1536)]), (1544, [(772, 768)] * 4)])
def test_large_pictures_go_through_the_autoencoder_in_one_pass_of_tiles(
    model: Any, side: int, pieces: list[tuple[int, int]]
) -> None:
    autoencoder, vae = plugin("nodes.host.vae"), SpyVAE()
    samples = autoencoder.encode_image(model, vae, torch.zeros(1, side, 1536, 3))
    autoencoder.decode_latent(vae, samples)
    probe = [] if side == 1536 else [(64, 64)]
    for way in ("encode", "decode"):
        sizes = [(height, width) for name, height, width in vae.calls if name == way]
        assert len(sizes) == len(pieces) + len(probe)
        area = sum(height * width for height, width in sizes if (height, width) not in probe)
        assert area == side * 1536, "without convolutions nothing around a tile is computed"
