"""The small model's autoencoder: TAESD's layout (8× smaller, 4 channels), trained from nothing.

The loss is Charbonnier on pixels and on their differences (edges count more than flat areas); a little noise on the
latent makes the code smooth enough for a diffusion model, and its mean and standard deviation per channel are held
near 0 and 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.crops import Crops
from ..data.order import Stream, by_image, seeded
from ..engine.loop_config import LoopConfig
from ..engine.samples import save_grid


@dataclass(kw_only=True, slots=True)
class AutoencoderConfig:
    """How the autoencoder is trained."""

    loop: LoopConfig
    """Settings of the optimisation."""
    crop: int = 64
    """Side of the crops in pixels."""
    min_scale: float = 0.85
    """Photos are shrunk by a random factor between this and 1 before cropping."""
    latent_noise: float = 0.06
    """Standard deviation of the noise added to the code."""
    edge_weight: float = 0.5
    """Weight of the loss on pixel differences."""
    color_weight: float = 2.0
    """Weight of the loss on 8×8 means: colour has little contrast of its own and would be the first thing to be
    dropped."""
    statistics_weight: float = 0.01
    """Weight that holds the code's mean near 0 and its standard deviation near 1."""


def build_autoencoder(seed: int = 0) -> Any:
    """A TAESD-shaped `diffusers.AutoencoderTiny` (1.2 M + 1.2 M parameters), freshly initialised."""
    from diffusers import AutoencoderTiny

    model: Any = AutoencoderTiny(scaling_factor=1.0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last_of_block = name.endswith(".conv.4")
            generator = seeded(seed, Stream.NANO_WEIGHTS, zlib.crc32(name.encode()))
            _he_normal(module.weight, generator, gain=0.3 if last_of_block else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _he_normal(weight: Tensor, generator: torch.Generator, gain: float) -> None:
    """He et al. 2015; without normalisation layers the depth needs it, with small steps at the end of residual
    blocks."""
    std = gain * (2 / weight[0].numel()) ** 0.5
    weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)


class AutoencoderTask:
    """Reconstruction of crops."""

    def __init__(self, config: AutoencoderConfig, crops: Crops) -> None:
        self.config, self.crops = config, crops
        self.device = config.loop.resolve_device()
        self.trained = build_autoencoder(config.loop.seed).to(self.device)

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Charbonnier on pixels and differences, plus the code's statistics."""
        x, _ = self.crops.batch(step, self.config.loop.micro_batch)
        x = to_signed(x.to(self.device)).contiguous(memory_format=torch.channels_last)
        z = self.trained.encoder(x)
        generators = by_image(self.config.loop.seed, Stream.NANO_AUTOENCODER_VIEW, images=self.config.loop.images(step))
        noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(self.device)
        y = self.trained.decoder(z + self.config.latent_noise * noise).float()
        pixels = charbonnier(y - x)
        edges = sum(charbonnier(d) for d in differences(y - x)) / 2
        color = charbonnier(F.avg_pool2d(y - x, 8))
        statistics = code_statistics(z.float())
        loss = pixels + self.config.edge_weight * edges + self.config.color_weight * color
        loss = loss + self.config.statistics_weight * statistics
        mse = (y.detach() - x).div(2).square().mean()
        return loss, {"psnr": float(-10 * mse.log10()), "code_std": float(z.detach().float().std())}

    def sample(self, folder: Path, step: int) -> None:
        """Originals above their reconstructions."""
        x = to_signed(torch.stack([self.crops.crop(i, seeded(9, i)) for i in range(0, 8)]).to(self.device))
        y = self.trained.decoder(self.trained.encoder(x))
        save_grid(folder / f"{step:06d}.png", [x.add(1).div(2), y.float().add(1).div(2)])


def to_signed(image_u8: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return image_u8.float().div(127.5).sub(1)


def charbonnier(error: Tensor, epsilon: float = 1e-2) -> Tensor:
    """mean(sqrt(e² + ε²) − ε): L1 that is smooth at zero."""
    return (error.square() + epsilon**2).sqrt().mean() - epsilon


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbours."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def code_statistics(z: Tensor) -> Tensor:
    """How far each channel of the code is from mean 0 and standard deviation 1."""
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    return (mean.square() + (std - 1).square()).sum()


def identity(config: AutoencoderConfig, crops: Crops) -> dict[str, Any]:
    """What must stay the same when the part is resumed."""
    return {
        "crop": config.crop,
        "photos": len(crops),
        "latent_noise": config.latent_noise,
        "color_weight": config.color_weight,
    }
