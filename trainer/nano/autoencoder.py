"""The small model's autoencoder: TAESD's layout (8× smaller) with a cosine code of 16 channels; its decoder is trained.

The encoder is exact (`dct`). A decoder of this layout cannot be: nearest doubling and a convolution do not know which
half of a cell they are in, and have to tell it from how the cells differ. So it grows. First the part before the second
doubling learns to give whole pictures, 4×4 pixels a place by a linear head: a tenth of the cost of the whole, and most
of what there is to learn. Then the part before the third, 2×2 pixels a place; then the whole.

The loss is Charbonnier on pixels, on their differences (edges count more than flat areas) and on 8×8 means.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.crops import Crops
from ..data.order import Stream, seeded
from ..engine.journal import Figures
from ..engine.loop_config import LoopConfig
from ..engine.samples import save_grid
from . import dct

_BEFORE_SECOND, _BEFORE_THIRD = 9, 14
"""Layers of TAESD's decoder that end the parts before the second and the third doubling of what they see."""
_WIDTH = 64


@dataclass(kw_only=True, slots=True)
class AutoencoderConfig:
    """How the autoencoder is trained."""

    loop: LoopConfig
    """Settings of the optimisation."""
    crop: int = 64
    """Side of the crops in pixels, a multiple of 8."""
    min_scale: float = 0.5
    """Photos are shrunk by a random factor between this and 1 before cropping: many are a little soft as they are."""
    grow: tuple[int, int] = (1500, 3500)
    """Steps at which the second and the third part of the decoder join."""
    head_weight: float = 0.1
    """Weight of the earlier parts' own pictures once a later part has joined."""
    flat: float = 0.06
    """Share of crops that are plain colours or slow ramps instead of photos, which are to come back without a weave."""
    edge_weight: float = 0.5
    """Weight of the loss on pixel differences."""
    color_weight: float = 0.5
    """Weight of the loss on 8×8 means."""


def build_autoencoder(seed: int = 0) -> Any:
    """A TAESD-shaped `diffusers.AutoencoderTiny` with the cosine code's encoder and a fresh decoder (1.2 M each)."""
    from diffusers import AutoencoderTiny

    model: Any = AutoencoderTiny(latent_channels=dct.CHANNELS, scaling_factor=dct.SCALING)
    dct.write_encoder(model.encoder.requires_grad_(False))
    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.Conv2d):
            last_of_block = name.endswith(".conv.4")
            generator = seeded(seed, Stream.NANO_WEIGHTS, zlib.crc32(name.encode()))
            _he_normal(module.weight, generator, gain=0.3 if last_of_block else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.constant_(model.decoder.layers[-1].bias, 0.5)
    return model


def _he_normal(weight: Tensor, generator: torch.Generator, gain: float) -> None:
    """He et al. 2015; without normalisation layers the depth needs it, with small steps at the end of residual
    blocks."""
    std = gain * (2 / weight[0].numel()) ** 0.5
    weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)


class GrowingDecoder(nn.Module):
    """A decoder of TAESD's layout whose earlier parts give pictures, too.

    Args:
        decoder: `diffusers`' DecoderTiny.
        seed: what the heads' start derives from.
    """

    def __init__(self, decoder: Any, seed: int = 0) -> None:
        super().__init__()
        self.decoder = decoder
        self.heads = nn.ModuleDict({"4": nn.Conv2d(_WIDTH, 48, 1), "2": nn.Conv2d(_WIDTH, 12, 1)})
        for side, head in self.heads.items():
            assert isinstance(head, nn.Conv2d)
            assert head.bias is not None
            _he_normal(head.weight, seeded(seed, Stream.NANO_WEIGHTS, int(side)), gain=0.5)
            nn.init.zeros_(head.bias)

    def forward(self, z: Tensor, level: int = 3) -> list[Tensor]:
        """Pictures (B, 3, H, W) in [−1, 1] of codes (B, 16, H/8, W/8) by the parts up to `level`, the last one last."""
        x, pictures = torch.tanh(z / 3) * 3, []
        for index, layer in enumerate(self.decoder.layers):
            x = layer(x)
            side = {_BEFORE_SECOND: 4, _BEFORE_THIRD: 2}.get(index)
            if side is not None:
                pictures.append(F.pixel_shuffle(self.heads[str(side)](x), side))
                if len(pictures) == level:
                    return pictures
        return [*pictures, x * 2 - 1]


class AutoencoderTask:
    """Reconstruction of crops."""

    def __init__(self, config: AutoencoderConfig, crops: Crops) -> None:
        self.config, self.crops = config, crops
        self.device = config.loop.resolve_device()
        vae = build_autoencoder(config.loop.seed)
        self.encoder = vae.encoder.to(self.device)
        decoder: Any = GrowingDecoder(vae.decoder, config.loop.seed)
        self.trained = decoder.to(self.device)
        self.trained.to(memory_format=torch.channels_last)

    def level(self, step: int) -> int:
        """How many parts of the decoder take part in a step."""
        return 1 + sum(step >= joined for joined in self.config.grow)

    def loss(self, step: int) -> tuple[Tensor, Figures]:
        """The mean loss of a part of a batch, each part of the decoder by its own picture."""
        images = self.config.loop.images(step)
        crops, _ = self.crops.batch(step, len(images))
        x = to_signed(torch.stack([self._flattened(c, n) for c, n in zip(crops, images, strict=True)]).to(self.device))
        x = x.contiguous(memory_format=torch.channels_last)
        *earlier, last = self.trained(self.encode(x), self.level(step))
        loss = self.reconstruction(last.float(), x)
        for picture in earlier:
            loss = loss + self.config.head_weight * self.reconstruction(picture.float(), x)
        mse = (last.detach().float() - x).div(2).square().mean()
        return loss, {"psnr": -10 * mse.log10(), "level": float(self.level(step))}

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes of pictures in [−1, 1]."""
        code: Tensor = self.encoder(x)
        return code

    def reconstruction(self, y: Tensor, x: Tensor) -> Tensor:
        """Charbonnier on pixels, differences and 8×8 means."""
        error = y - x
        edges = torch.stack([charbonnier(d) for d in differences(error)]).mean()
        color = charbonnier(F.avg_pool2d(error, dct.CELL))
        return charbonnier(error) + self.config.edge_weight * edges + self.config.color_weight * color

    def _flattened(self, crop: Tensor, number: int) -> Tensor:
        """The crop, or in its place a plain colour or a slow ramp."""
        u = torch.rand(9, generator=seeded(self.config.loop.seed, Stream.NANO_AUTOENCODER_VIEW, number))
        if u[0] >= self.config.flat:
            return crop
        places = torch.linspace(-0.5, 0.5, crop.shape[-1])
        slopes = (u[4:7] - 0.5) * (u[7] < 0.5)
        plane = u[1:4].view(3, 1, 1) + slopes.view(3, 1, 1) * (places if u[8] < 0.5 else places[:, None])
        return plane.expand(crop.shape).clamp(0, 1).mul(255).round().to(torch.uint8)

    @torch.no_grad()
    def sample(self, folder: Path, step: int) -> None:
        """Originals above their reconstructions."""
        x = to_signed(torch.stack([self.crops.crop(i % len(self.crops), seeded(9, i)) for i in range(8)]))
        y = self.trained(self.encode(x.to(self.device)), self.level(step))[-1]
        save_grid(folder / f"{step:06d}.png", [x.add(1).div(2), y.float().cpu().add(1).div(2)])


def exported(weights: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """The autoencoder's tensors: the exact encoder and the trained decoder, without its heads."""
    decoder = {name: tensor for name, tensor in weights.items() if name.startswith("decoder.")}
    return decoder | {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}


def to_signed(image_u8: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return image_u8.float().div(127.5).sub(1)


def charbonnier(error: Tensor, epsilon: float = 1e-2) -> Tensor:
    """mean(sqrt(e² + ε²) − ε): L1 that is smooth at zero."""
    return (error.square() + epsilon**2).sqrt().mean() - epsilon


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbours."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def identity(config: AutoencoderConfig, crops: Crops) -> dict[str, Any]:
    """What must stay the same when the part is resumed."""
    kept = {name: value for name, value in asdict(config).items() if name != "loop"}
    return {**kept, "photos": len(crops), "code": list(dct.SCALES)}
