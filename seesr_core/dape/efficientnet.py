"""EfficientNet-Lite0 as the tagger's image encoder, in place of RAM's Swin (Tan & Le, ICML 2019, in its Lite form).

Inverted bottlenecks without attention to channels, ReLU6 throughout. Parameter names are the published ones; each batch
normalisation is folded into the convolution before it. Shape letters: B batch, C channels, N tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import SettingsError
from ..formats.schema import Within
from .preprocess import denormalize, require_square

REDUCTION = 32
"""Pixels a side for one place of the last feature map."""
WIDTH = 1280
"""Channels of the last feature map."""
_STEM = 32
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Expansion, kernel, stride, channels and number of the blocks of each stage."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LiteConfig:
    """What varies of the encoder: only the size of its input."""

    image_size: Annotated[int, Within(REDUCTION, 2048)] = 256
    """Side of the square input in pixels, a multiple of 32; no weight's shape depends on it."""

    def __post_init__(self) -> None:
        if self.image_size < REDUCTION or self.image_size % REDUCTION:
            raise SettingsError(
                f"EfficientNet-Lite0 takes images whose side is a multiple of {REDUCTION} pixels; "
                f"found {self.image_size}."
            )

    @property
    def width(self) -> int:
        """Channels of the output."""
        return WIDTH

    @property
    def grid(self) -> int:
        """Side of the output's grid of tokens."""
        return self.image_size // REDUCTION

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, prefix: str = "visual_encoder.", image_size: int | None = None
    ) -> LiteConfig | None:
        """The configuration of an encoder below `prefix`, or None if another one is there; 256 pixels unless given."""
        if f"{prefix}_conv_stem.weight" not in state:
            return None
        return cls() if image_size is None else cls(image_size=image_size)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: the output has ⌈size / stride⌉, an odd rest goes to the lower right."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', ⌈H / stride⌉, ⌈W / stride⌉)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        rests = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x_BCHW.shape[-2:])
        (top, bottom), (left, right) = ((rest // 2, rest - rest // 2) for rest in rests)
        padded = F.pad(x_BCHW, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class Block(nn.Module):
    """An inverted bottleneck: expanded, filtered channel by channel, projected; names of parts as published."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self._expand_conv = nn.Conv2d(channels, inner, 1) if expansion > 1 else None
        self._depthwise_conv = SameConv(inner, inner, kernel, stride=stride, groups=inner)
        self._project_conv = nn.Conv2d(inner, out, 1)
        self.skips = stride == 1 and channels == out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """One block; the input is added where the shape stays the same."""
        y = x_BCHW if self._expand_conv is None else F.relu6(self._expand_conv(x_BCHW))
        y = self._project_conv(F.relu6(self._depthwise_conv(y)))
        return x_BCHW + y if self.skips else y


class LiteTrunk(nn.Module):
    """The network without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, _STEM, 3, stride=2)
        blocks, channels = [], _STEM
        for expansion, kernel, stride, out, count in _STAGES:
            for index in range(count):
                blocks.append(Block(channels, out, expansion, kernel, stride if index == 0 else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, WIDTH, 1)

    def stem(self, levels_B3HW: Tensor) -> Tensor:
        """`levels` of pictures to what the first block takes, (B, 32, H/2, W/2)."""
        return F.relu6(self._conv_stem(levels_B3HW))

    def last_map(self, levels_B3HW: Tensor) -> Tensor:
        """`levels` of pictures to the last feature map, (B, 1280, H/32, W/32), from 0 to 6."""
        x = self.stem(levels_B3HW)
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._conv_head(x))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights that keep the size of signals (He et al., ICCV 2015): normal, biases 0.

        Without normalisation behind them, convolutions of any smaller weights would pass nothing on.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                gain = 1.0 if name.endswith("_project_conv") else 2.0  # nothing is cut off behind a projection
                module.weight.normal_(0.0, (gain / module.weight[0].numel()) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()


def levels(image_B3HW: Tensor) -> Tensor:
    """RGB in [0, 1] to the levels of the network's training, (255 x − 127) / 128."""
    return (image_B3HW * 255.0 - 127.0) / 128.0


class LiteEncoder(LiteTrunk):
    """Normalised image to the tokens of the last feature map with their mean in front; no norm closes it."""

    def __init__(self, config: LiteConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """(B, 3, size, size), ImageNet-normalised, to (B, 1 + tokens, 1280); token 0 is the mean of the others.

        Raises:
            ImageError: the image does not have the encoder's size.
        """
        require_square(x_B3HW, self.config.image_size)
        # In half precision the way over [0, 1] would cost digits.
        given = levels(denormalize(x_B3HW.float())).to(x_B3HW.dtype)
        tokens_BND = rearrange(self.last_map(given), "b d h w -> b (h w) d")
        return torch.cat([tokens_BND.mean(dim=1, keepdim=True), tokens_BND], dim=1)
