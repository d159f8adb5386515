"""Tiled VAE: exact for convolutional autoencoders, approximate for AutoencoderKL, passes bounded by the tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from seesr_core.errors import SettingsError
from seesr_core.tiling import autoencoder as vae_tiling
from seesr_core.tiling.autoencoder import decode_tiled, encode_tiled


def picture(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.randn(1, 3, 4, 6, generator=generator), (height, width), mode="bicubic")
    return (0.4 * coarse + 0.1 * torch.randn(1, 3, height, width, generator=generator)).clamp(-1, 1)


def seeded(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


def tiny() -> AutoencoderTiny:
    blocks = {"num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (1, 2, 1)}
    channels = {"encoder_block_out_channels": (4,) * 3, "decoder_block_out_channels": (4,) * 3}
    return seeded(AutoencoderTiny(**blocks, **channels, scaling_factor=0.5))


def kl() -> Any:
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    sizes = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 64}
    return seeded(AutoencoderKL(down_block_types=down, up_block_types=up, **sizes))


def encode_whole(vae: Any, image: Tensor) -> Tensor:
    encoded = vae.encode(image)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents * vae.config.scaling_factor


def decode_whole(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents / vae.config.scaling_factor).sample


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(120, 200), (256, 40), (40, 44)])
def test_convolutional_autoencoder_is_exact(height, width):
    vae, image = tiny(), picture(height, width)
    latents = encode_tiled(vae, image, tile_px=48)
    torch.testing.assert_close(latents, encode_whole(vae, image), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_tiled(vae, latents, tile_px=48), decode_whole(vae, latents), atol=1e-5, rtol=1e-5)


def local(vae: Any) -> Any:
    """`vae` without what looks at the whole picture, so that only the reach of its convolutions is left."""
    for name, module in list(vae.named_modules()):
        if isinstance(module, nn.GroupNorm):
            parent, _, child = name.rpartition(".")
            setattr(vae.get_submodule(parent), child, nn.Identity())
    return without_attention(vae)


def without_attention(vae: Any) -> Any:
    for module in vae.modules():
        if type(module).__name__ == "Attention":
            nn.init.zeros_(module.to_out[0].weight)
    return vae


@torch.no_grad()
def test_surrounding_reaches_as_far_as_the_convolutions_of_kl():
    vae, image = local(kl()), picture(160, 224)
    latents = encode_tiled(vae, image, tile_px=64)
    torch.testing.assert_close(latents, encode_whole(vae, image), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode_tiled(vae, latents, tile_px=64), decode_whole(vae, latents), atol=1e-4, rtol=1e-4)


class OneNorm(nn.Module):
    """The smallest autoencoder with a group norm: what tiles must agree on is its statistics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=(4,), scaling_factor=1.0, get=lambda _name: None)
        self.norm = nn.GroupNorm(2, 4)
        nn.init.normal_(self.norm.weight, generator=torch.Generator().manual_seed(0))

    def decode(self, z: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.norm(z))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_statistics_are_those_of_the_whole_picture(dtype):
    vae = OneNorm().to(dtype)
    z = (torch.linspace(0, 3, 30) * torch.randn(2, 4, 20, 30, generator=torch.Generator().manual_seed(0)) + 5).to(dtype)
    actual = decode_tiled(vae, z, tile_px=7)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, vae.norm(z), atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-5)


@torch.no_grad()
def test_kl_without_attention_is_exact_under_the_statistics_of_the_whole_picture(monkeypatch):
    """Tiling errs by its estimated statistics and by attention, not by convolutions or edges."""
    vae, image = without_attention(kl()), picture(160, 224)
    share = vae_tiling._shared_norms
    monkeypatch.setattr(vae_tiling, "_shared_norms", lambda net, _measure: share(net, lambda: net.encode(image)))
    torch.testing.assert_close(encode_tiled(vae, image, tile_px=64), encode_whole(vae, image), atol=1e-4, rtol=1e-4)


class MeanOfWhatItSees(OneNorm):
    """An autoencoder whose tiles disagree: each is one flat colour."""

    def decode(self, z: Tensor) -> SimpleNamespace:
        self.norm(z)
        return SimpleNamespace(sample=z.mean((-2, -1), keepdim=True).expand_as(z))


@torch.no_grad()
def test_tiles_that_disagree_are_crossfaded_in_even_steps():
    z = torch.arange(20.0).expand(1, 4, 10, 20)
    steps = decode_tiled(MeanOfWhatItSees(), z, tile_px=10)[0, 0].diff(dim=-1)
    # The left tile sees columns 0 … 13, the right one 6 … 19; they share 6 … 13.
    expected = torch.zeros(19)
    expected[6:13] = (12.5 - 6.5) / 8
    expected[[5, 13]] = (12.5 - 6.5) / 16
    torch.testing.assert_close(steps, expected.expand_as(steps))


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny, kl])
def test_a_picture_of_one_tile_is_processed_whole(make):
    vae, image = make(), picture(48, 64)
    assert torch.equal(encode_tiled(vae, image, tile_px=64), encode_whole(vae, image))


@contextmanager
def sizes_seen(module: nn.Module) -> Iterator[list[int]]:
    sizes: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, args: sizes.append(max(args[0].shape[-2:])))
    yield sizes
    hook.remove()


@pytest.mark.parametrize("make", [tiny, kl])
def test_no_pass_is_larger_than_the_tile_and_its_surrounding(make):
    vae = make()
    with sizes_seen(vae.encoder) as small:
        encode_tiled(vae, picture(192, 192), tile_px=32)
    with sizes_seen(vae.encoder) as large:
        encode_tiled(vae, picture(192, 288), tile_px=32)
    assert max(large) == max(small) < 192


def test_hooks_are_gone_afterwards_even_after_a_failure():
    vae = kl()
    with pytest.raises(RuntimeError):
        decode_tiled(vae, torch.zeros(1, 5, 40, 40), tile_px=64)
    decode_tiled(vae, torch.zeros(1, 4, 40, 40), tile_px=64)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vae.modules())


@pytest.mark.parametrize(
    ("image", "tile_px", "message"),
    [((64, 64), 3, r"at least 4 pixels"), ((64, 66), 64, r"multiples of 4 .* found 66×64")],
)
def test_impossible_settings_are_refused(image, tile_px, message):
    with pytest.raises(SettingsError, match=message):
        encode_tiled(tiny(), torch.zeros(1, 3, *image), tile_px=tile_px)
