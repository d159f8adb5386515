"""The denoising loss at fixed noise: equation 2 on HR latents with the same noise and timesteps for every row.

Free of sampling, guidance and colour fix, so small effects of the prompts show that pictures hide.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError
from seesr_core.method.denoiser import Denoiser
from seesr_core.method.losses import noise_loss
from seesr_core.method.schedule import acp_at, q_sample
from seesr_core.method.text import training_text
from seesr_core.pictures.sizes import prepare
from seesr_core.pipeline import Prompts, SeeSRPipeline
from seesr_core.settings import UpscaleSettings
from seesr_core.tiling.runner import PlacedDenoiser

from ...data.order import Stream, seeded
from ..pictures import as_tensor

TIMESTEPS = (100, 300, 500, 700, 900)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A pair, ready for the loss."""

    latent: Tensor
    """z₀, the scaled latent of HR (1, 4, h, w)."""
    condition: Tensor
    """The upscaled LR, uint8 (1, 3, 8h, 8w)."""
    noises: Tensor
    """ε of each timestep (S, 4, h, w)."""
    timesteps: tuple[int, ...]
    """Timestep t of each noise."""


def condition_of(lr: Image.Image, settings: UpscaleSettings) -> Tensor:
    """What ControlNet sees of a photo: uint8 (1, 3, 8h, 8w), exactly LR × scale."""
    return as_tensor(prepare(lr, scale=settings.scale, min_size=0))[None]


def make_target(
    pipeline: SeeSRPipeline,
    lr: Image.Image,
    hr_3HW: Tensor,
    name: str,
    settings: UpscaleSettings,
    *,
    timesteps: Sequence[int] = TIMESTEPS,
) -> Target:
    """The pair `name`; its noise derives from the seed of `settings` and the name.

    Raises:
        DataError: HR is not LR × scale, or its sides are no multiples of 8.
    """
    condition = condition_of(lr, settings)
    if condition.shape[1:] != hr_3HW.shape:
        raise DataError(
            f"{name}: HR should be LR × {settings.scale:g} with sides that are multiples of 8, "
            f"{condition.shape[3]}×{condition.shape[2]}; it has {hr_3HW.shape[2]}×{hr_3HW.shape[1]} pixels."
        )
    latent = pipeline.encode(hr_3HW[None], settings)
    generator = seeded(settings.seed, Stream.TEST_DENOISING, zlib.crc32(name.encode()))
    noises = torch.randn((len(timesteps), *latent.shape[1:]), generator=generator)
    return Target(latent=latent, condition=condition, noises=noises, timesteps=tuple(timesteps))


@torch.no_grad()
def denoising_loss(pipeline: SeeSRPipeline, target: Target, prompts: Prompts) -> float:
    """Mean of ‖ε − ε̂(z_t, z_lr, t, p_h, p_s)‖² over timesteps and elements, without guidance.

    The text is what stage 2 trains with: the tags as "a, b," without the words added in use, empty without tags.
    """
    models = pipeline.models
    text = pipeline.encode_text([training_text([tag.name for tag in tags]) for tags in prompts.tags])
    denoiser = Denoiser(
        unet=models.unet,
        controlnet=models.controlnet,
        positive=text,
        negative=text,
        soft_prompt=prompts.soft_prompt,
        image=target.condition,
        cfg=1.0,
    )
    predict = PlacedDenoiser(denoiser=denoiser, device=models.device, dtype=models.dtype)
    errors = []
    for t, noise in zip(target.timesteps, target.noises[:, None], strict=True):
        errors.append(noise_loss(predict(q_sample(target.latent, noise, acp_at(t)), t), noise))
    return float(torch.stack(errors).mean())
