"""The numbers that the host's networks are compared with, from the core's own networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seesr_core.formats import sd
from seesr_core.formats.base import build_tokenizer
from seesr_core.formats.ldm import taesd_from_ldm, taesd_to_ldm, unet_from_ldm, unet_to_ldm
from seesr_core.method.text import encode_prompts

from .host.small_base import (
    PROMPT,
    RECORDED,
    TEXT,
    TIMESTEP,
    UNET,
    VAE,
    draw_all,
    drawn,
    small_inputs,
    tokenizer_files,
)


@torch.no_grad()
def test_recorded_numbers_are_those_of_the_core() -> None:
    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet: Any = UNet2DConditionModel(**UNET)
    vae: Any = AutoencoderTiny(**VAE)
    text: Any = CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
    unet.load_state_dict(unet_from_ldm(draw_all(unet_to_ldm(unet.state_dict(), UNET)), UNET))
    vae.load_state_dict(taesd_from_ldm(draw_all(taesd_to_ldm(vae.state_dict()))))
    for key, parameter in text.named_parameters():
        # transformers 4 begins its keys with `text_model.`, as files do.
        parameter.copy_(drawn(f"text_model.{key.removeprefix('text_model.')}", parameter.shape))

    latent, picture = small_inputs()
    states = encode_prompts([PROMPT], build_tokenizer(tokenizer_files(sd)), text)
    found = {
        "text": states[0, [1, 76], :2].flatten(),
        "eps": unet.eval()(latent, torch.tensor([TIMESTEP]), states).sample[0, :, 3, 5],
        "latent": vae.eval().encode(picture * 2 - 1).latents[0, :, 1, 2] * vae.config.scaling_factor,
        "picture": (vae.decode(latent).sample[0, :, 9, 9] + 1) / 2,
    }
    assert {name: values.tolist() for name, values in found.items()} == {
        name: pytest.approx(values, abs=1e-5) for name, values in RECORDED.items()
    }
