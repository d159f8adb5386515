"""SeeSRLatentInit: what the U-Net sees first, its noise, and wrong plugs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from .locate import plugin
from .nets import LATENT_CHANNELS, NANO, nano_model
from .sampling import ddpm, host_extras, latents, outputs, prompts, sample_stock, sigmas, unet_inputs

SCALE = 0.18215


@functools.cache
def nano_vae() -> Any:
    import comfy.sd

    prefix = "first_stage_model."
    tensors = load_file(NANO / "checkpoints" / "seesr-nano.safetensors")
    return comfy.sd.VAE(sd={key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})


@functools.cache
def kl_vae() -> Any:
    """A KL autoencoder with a wide posterior, so that its mode and its samples are told apart."""
    import comfy.sd

    size = {"double_z": True, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "z_channels": LATENT_CHANNELS}
    ddconfig = {**size, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    sd = {
        f"{side}.conv_in.weight": torch.zeros(32, n, 3, 3) for side, n in (("encoder", 3), ("decoder", LATENT_CHANNELS))
    }
    torch.manual_seed(0)
    vae = comfy.sd.VAE(sd=sd, config={"params": {"ddconfig": ddconfig, "embed_dim": LATENT_CHANNELS}})
    vae.latent_channels = LATENT_CHANNELS
    vae.first_stage_model.load_state_dict(
        {
            key: 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
            for i, (key, tensor) in enumerate(vae.first_stage_model.state_dict().items())
        }
    )
    return vae


@pytest.fixture(autouse=True, scope="module")
def _no_models_left() -> Iterator[None]:
    """The host's patchers cannot be torn down when Python ends."""
    yield
    nano_vae.cache_clear()
    kl_vae.cache_clear()


def picture(batch: int = 1, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(0))


def lre(model: Any, levels: Tensor, seed: int = 5, start_timestep: int = 999) -> Any:
    return plugin("nodes.host.noise").LRENoise.for_model(model, levels, seed=seed, start_timestep=start_timestep)


def normal(latent: dict[str, Any], seed: int) -> Tensor:
    return torch.cat(
        [
            torch.randn(1, *image.shape, generator=torch.Generator().manual_seed(seed + i))
            for i, image in enumerate(latent["samples"])
        ]
    )


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"steps": 50}, 999),
        ({"steps": 10}, 999),
        ({"steps": 2}, 999),
        ({"steps": 2, "spacing": "trailing"}, 999),  # begins at the host's largest sigma
        ({"steps": 10, "start_timestep": 500}, 500),
        ({"steps": 10, "start_timestep": 401}, 401),
        ({"steps": 50, "start_timestep": 1}, 1),
    ],
)
def test_the_unet_first_sees_the_lr_embedding(options, start):
    """LRE as published: the photo's latent noised to `start`, whatever the first timestep is."""
    model, latent = nano_model(), latents(batch=2)
    levels = sigmas(model, **options)
    with unet_inputs(model) as seen:
        sample_stock(model, lre(model, levels, start_timestep=start), levels[:2], latent)
    expected = plugin("seesr_core.method.schedule").lr_embedding(SCALE * latent["samples"], normal(latent, 5), start)
    error = (seen[0][:2] - expected).norm() / expected.norm()
    assert error < 1e-6
    assert torch.allclose(seen[0][:2], expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("first", [251, 499.3])
def test_lower_sigmas_are_followed_by_a_start_left_at_999(first):
    """Scheduler at 251, or another scheduler at half the denoising: what the U-Net sees has the noise it is told of."""
    model, latent = nano_model(), latents(batch=2)
    sampling = model.get_model_object("model_sampling")
    levels = torch.tensor([float(sampling.sigma(torch.tensor(first * f))) for f in (1.0, 0.9)] + [0.0])
    with unet_inputs(model) as seen:
        sample_stock(model, lre(model, levels), levels, latent)
    acp = 1 / (1 + float(levels[0]) ** 2)
    expected = acp**0.5 * SCALE * latent["samples"] + (1 - acp) ** 0.5 * normal(latent, 5)
    assert torch.allclose(seen[0][:2], expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["euler", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "heun", "lcm"])
def test_any_stock_sampler_starts_there(name):
    import comfy.samplers

    model, latent = nano_model(), latents()
    levels = sigmas(model, steps=2)
    with unet_inputs(model) as seen:
        sampled = sample_stock(model, lre(model, levels), levels, latent, sampler=comfy.samplers.sampler_object(name))
    expected = plugin("seesr_core.method.schedule").lr_embedding(SCALE * latent["samples"], normal(latent, 5))
    assert torch.allclose(seen[0][:1], expected, rtol=0, atol=5e-6)
    assert torch.isfinite(sampled).all()


def test_nodes_without_a_noise_input_start_there_by_the_hosts_add_noise():
    """LATENT of AddNoise, then SamplerCustom with its own noise off."""
    model, latent, extras = nano_model(), latents(), host_extras()
    levels = sigmas(model, steps=2)
    noisy = outputs(extras.AddNoise().add_noise(model, lre(model, levels), levels, latent))[0]
    positive, negative = prompts()
    with unet_inputs(model) as seen:
        extras.SamplerCustom().sample(model, False, 0, 3.0, positive, negative, ddpm(), levels, noisy)
    expected = plugin("seesr_core.method.schedule").lr_embedding(SCALE * latent["samples"], normal(latent, 5))
    assert torch.allclose(seen[0][:1], expected, rtol=0, atol=5e-6)


def test_a_batch_is_single_runs():
    model, latent = nano_model(), latents(batch=3)
    noise = lre(model, sigmas(model), seed=7)
    whole = noise.generate_noise(latent)
    for i in range(3):
        single = lre(model, sigmas(model), seed=7 + i).generate_noise({"samples": latent["samples"][i : i + 1]})
        assert torch.equal(whole[i : i + 1], single)
    second = {"samples": latent["samples"][1:2], "batch_index": [1]}  # LatentFromBatch
    assert torch.equal(noise.generate_noise(second), whole[1:2])


def test_the_largest_seed_serves_a_batch():
    model, latent = nano_model(), latents(batch=2)
    levels = sigmas(model)
    assert torch.isfinite(sample_stock(model, lre(model, levels, seed=2**64 - 2), levels, latent)).all()


def test_half_precision_latents_lose_nothing_in_the_noise():
    model, latent = nano_model(), latents()
    noise = lre(model, sigmas(model))
    half = {"samples": latent["samples"].half()}
    assert noise.generate_noise(half).dtype == torch.float32
    assert torch.equal(noise.generate_noise(half), noise.generate_noise({"samples": half["samples"].float()}))


@pytest.mark.parametrize("vae", [nano_vae, kl_vae])
def test_the_node_gives_the_mode_of_the_posterior(vae):
    model, image = nano_model(), picture(2)
    (noise, latent) = outputs(
        plugin("nodes.latent").SeeSRLatentInit.execute(model, vae(), image, sigmas(model), seed=3)
    )
    assert noise.seed == 3
    assert latent["samples"].shape == (2, LATENT_CHANNELS, 8, 8)
    net = vae().first_stage_model
    with torch.no_grad():
        pixels = image.movedim(-1, 1) * 2 - 1
        if vae is kl_vae:
            mean, log_variance = net.quant_conv(net.encoder(pixels)).chunk(2, dim=1)
            assert log_variance.exp().mean() > 0.1
        else:
            mean = net.encode(pixels)
    assert torch.allclose(latent["samples"], mean.float(), atol=1e-4)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`nodes.host.vae`, for which pictures above 64² are large."""
    module = plugin("nodes.host.vae")
    monkeypatch.setattr(module, "LARGE_PIXELS", 64 * 64)
    monkeypatch.setattr(module, "TILE_PX", 64)
    return module


@torch.inference_mode()  # as the host runs its nodes
def test_large_pictures_pass_a_convolutional_autoencoder_in_tiles_exactly(small_tiles):
    vae, image = nano_vae(), picture(1, 96, 160)
    whole = vae.encode(image)
    torch.testing.assert_close(small_tiles.encode_image(nano_model(), vae, image), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(small_tiles.decode_latent(vae, whole), vae.decode(whole), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_large_pictures_pass_a_kl_autoencoder_in_tiles_nearer_than_by_the_host_s_three_passes(small_tiles):
    vae, image = kl_vae(), picture(1, 96, 160)
    whole = vae.encode(image)
    for found, host, exact in (
        (
            small_tiles.encode_image(nano_model(), vae, image),
            vae.encode_tiled(image, tile_x=64, tile_y=64, overlap=16),
            whole,
        ),
        (small_tiles.decode_latent(vae, whole), vae.decode_tiled(whole, 8, 8, 2), vae.decode(whole)),
    ):
        assert (found - exact).square().mean() < (host - exact).square().mean()


def refusal(match: str) -> Any:
    return pytest.raises(plugin("seesr_core.errors").SeeSRError, match=match)


def test_sigmas_above_the_start_are_refused():
    model = nano_model()
    with refusal(r"begin at timestep 901, above start_timestep 500"):
        lre(model, sigmas(model, steps=10), start_timestep=500)


def test_sigmas_far_below_a_chosen_start_are_refused():
    model = nano_model()
    with refusal(r"begin at timestep 241, far below start_timestep 600.*Leave start_timestep at 999"):
        lre(model, sigmas(model, steps=50, start_timestep=251), start_timestep=600)


def test_sigmas_of_a_model_with_another_schedule_are_named():
    """The MODEL was re-scheduled between the nodes: both have the same number, which is not what is wrong."""
    import comfy_extras.nodes_model_advanced as advanced

    model = nano_model()
    changed = outputs(advanced.ModelSamplingDiscrete().patch(model, "eps", True))[0]
    for made_for, used_for in ((changed, model), (model, changed)):
        levels = sigmas(made_for, steps=50, start_timestep=261)
        if plugin("nodes.host.noise_levels").NoiseLevels.of(used_for).is_above(float(levels[0]), 261):
            with refusal(r"none of this MODEL's timesteps .*start_timestep is 261.*Connect the same MODEL"):
                lre(used_for, levels, start_timestep=261)
            return
    raise AssertionError("neither schedule lies above the other")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([], "at least one step"),
        ([1.0], "at least one step"),
        ([1.0, 2.0, 0.0], "that fall from a positive"),
        ([0.0, 0.0], "that fall from a positive"),
        ([float("nan"), 0.0], "no numbers"),
    ],
)
def test_bad_sigmas_are_refused(values, match):
    with refusal(match):
        lre(nano_model(), torch.tensor(values))


@pytest.mark.parametrize("start", [-1, 1000])
def test_a_start_outside_the_schedule_is_refused(start):
    model = nano_model()
    with refusal("start timestep must be between 0 and 999"):
        lre(model, sigmas(model), start_timestep=start)


def test_pictures_of_odd_size_or_with_nan_are_refused():
    encode, model = plugin("nodes.host.vae").encode_image, nano_model()
    with refusal(r"multiples of 8, found 60×64"):
        encode(model, nano_vae(), picture(1, 64, 60))
    with refusal("no numbers"):
        encode(model, nano_vae(), picture() / 0)


class FakeVAE:
    """An autoencoder that makes latents of one value."""

    latent_dim = 2

    def __init__(self, channels: int, value: float) -> None:
        self.latent_channels = channels
        self._value = value

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.full((len(pixels), self.latent_channels, 8, 8), self._value)


@pytest.mark.parametrize(
    ("vae", "match"),
    [
        (FakeVAE(LATENT_CHANNELS + 1, 0.0), f"found one .* {LATENT_CHANNELS + 1} channels"),
        (FakeVAE(LATENT_CHANNELS, float("nan")), "does not work in this precision"),
    ],
)
def test_a_vae_of_another_model_or_with_nan_is_refused(vae, match):
    with refusal(match):
        plugin("nodes.host.vae").encode_image(nano_model(), vae, picture())
