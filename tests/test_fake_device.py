"""What runs on a device runs on one that is not there, too: nothing is left on the CPU by mistake, no tensor has a
dtype that a device may lack, and nothing waits for the device within the sampling loop.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from seesr_core.pipeline import SeeSRPipeline

from .dape_nets import CONFIG, LITE, lite_dape
from .fake_device import FakeDevice, Watch
from .segsr_nets import tiny_segsr
from .tiny_model import tiny_models

DEVICES = {"cuda:0": torch.float16, "mps:0": torch.float32, "xpu:0": torch.bfloat16}
"""And the precision that is tried on each."""
SOFT = torch.zeros(1, 10, CONFIG.token_width)
COPIES_A_CALL = 9
"""Copies between host and device in one call of the networks, at most: latents, picture, the text of both halves, the
soft prompt and two timesteps there, the prediction back."""


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> FakeDevice:
    return FakeDevice(request.param)


def placed(place: FakeDevice, **changes: Any) -> SeeSRPipeline:
    """The tiny model on the device, U-Net, ControlNet and autoencoder in the device's precision."""
    from copy import deepcopy

    models, dtype = tiny_models(), DEVICES[str(place.device)]
    nets = {name: place.module(deepcopy(getattr(models, name)), dtype) for name in ("unet", "controlnet", "vae")}
    nets |= {name: place.module(deepcopy(getattr(models, name))) for name in ("text_encoder", "dape")}
    nets |= {name: place.module(net, dtype) for name, net in changes.items()}
    return SeeSRPipeline(models=replace(models, **nets, device=place.device, dtype=dtype))


def check(watch: Watch) -> None:
    assert watch.calls > 0
    assert not watch.missing


def test_sampling_in_tiles_waits_for_nothing_and_copies_little(place: FakeDevice) -> None:
    pipeline = placed(place)
    settings = pipeline.settings(steps=2, start_timestep=999, cfg=2.0, tile=128, overlap=32, tile_batch=2)
    prepared, states = torch.zeros(1, 3, 192, 192, dtype=torch.uint8), torch.zeros(2, 16, 32)
    with place.watched() as watch, torch.no_grad():
        latent = pipeline.sample(prepared, torch.zeros(1, 4, 24, 24), states, SOFT, settings)
    assert latent.device.type == "cpu"
    check(watch)
    calls = 2 * 2
    assert sum(watch.copies.values()) <= COPIES_A_CALL * calls


def test_a_segmentation_beside_the_picture(place: FakeDevice) -> None:
    """SegSR's networks are few and stay in float32."""
    pipeline = placed(place)
    pipeline.models.segsr = place.module(tiny_segsr())
    settings = pipeline.settings(steps=2, start_timestep=999, cfg=2.0, tile=128, overlap=32)
    prepared, states, z_lr = (
        torch.zeros(1, 3, 192, 192, dtype=torch.uint8),
        torch.zeros(2, 16, 32),
        torch.zeros(1, 4, 24, 24),
    )
    with place.watched() as watch, torch.no_grad():
        joint = pipeline.join(z_lr, SOFT, settings)
        latent = pipeline.sample(prepared, z_lr, states, SOFT, settings, joint=joint)
        assert joint is not None
        labels = joint.labels()
    assert (latent.device.type, labels.device) == ("cpu", place.device)
    check(watch)


def test_tagger_and_text_encoder(place: FakeDevice) -> None:
    pipeline = placed(place)
    size = pipeline.models.dape.config.image_size
    with place.watched() as watch, torch.no_grad():
        tokens, logits = pipeline.models.dape(torch.zeros(2, 3, size, size, device=place.device))
        assert tokens.device.type == logits.device.type == place.device.type
        assert pipeline.encode_text(["a", "b"]).device.type == "cpu"
    check(watch)


def test_tagger_of_convolutions_in_the_precision_of_the_device(place: FakeDevice) -> None:
    dtype = DEVICES[str(place.device)]
    dape = place.module(lite_dape(), dtype)
    with place.watched() as watch, torch.no_grad():
        found = dape(torch.zeros(2, 3, LITE.image_size, LITE.image_size, device=place.device, dtype=dtype))
    assert {part.device.type for part in found} == {place.device.type}
    assert {part.dtype for part in found} == {dtype}
    check(watch)
    assert not watch.copies


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_autoencoder_in_tiles(place: FakeDevice, kind: str) -> None:
    pipeline = placed(place) if kind == "tiny" else placed(place, vae=small_kl())
    settings = pipeline.settings(vae_tile=64)
    with place.watched() as watch, torch.no_grad():
        z = pipeline.encode(torch.zeros(1, 3, 128, 192, dtype=torch.uint8), settings)
        image = pipeline.decode(z, settings)
    assert (tuple(image.shape), image.dtype, image.device.type) == ((1, 3, 128, 192), torch.uint8, "cpu")
    check(watch)


def small_kl() -> Any:
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
    }
    vae: Any = AutoencoderKL(**blocks)
    return vae.eval()


def test_a_tensor_left_on_the_cpu_is_noticed(place: FakeDevice) -> None:
    pipeline = placed(place)
    linear = pipeline.models.controlnet.time_embedding.linear_1
    linear.weight = torch.nn.Parameter(torch.zeros(linear.weight.shape, dtype=linear.weight.dtype))
    settings = pipeline.settings(steps=1, start_timestep=999)
    prepared, states = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(2, 16, 32)
    with pytest.raises(RuntimeError, match="device"), place.watched(), torch.no_grad():
        pipeline.sample(prepared, torch.zeros(1, 4, 8, 8), states, SOFT, settings)
