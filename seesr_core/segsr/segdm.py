"""SegDM, the network that denoises a segmentation map: a small U-Net at the latent's resolution, of torch alone.

Shape letters: B pictures, N bits of a label, C channels, h w latent cells, L tokens of width D.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method.schedule import TRAIN_TIMESTEPS

_GROUPS = 8


def time_features(acp_B: Tensor, width: int) -> Tensor:
    """Sines of the noise's share √(1 − ᾱ), (B, width)."""
    rates = torch.exp(torch.arange(width // 2, device=acp_B.device) * (-math.log(10_000.0) / (width // 2)))
    angles = (1.0 - acp_B.float()).clamp_min(0).sqrt()[:, None] * TRAIN_TIMESTEPS * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


class ResBlock(nn.Module):
    """Two convolutions around the noise level, beside a shortcut."""

    def __init__(self, inner: int, outer: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(_GROUPS, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.time = nn.Linear(time, outer)
        self.norm2, self.conv2 = nn.GroupNorm(_GROUPS, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time_BT: Tensor) -> Tensor:
        """(B, inner, h, w) → (B, outer, h, w)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time_BT)[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)


class SelfAttention(nn.Module):
    """Every cell looks at every other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(_GROUPS, width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x_BChw: Tensor) -> Tensor:
        """The input with what was looked up."""
        cells = self.norm(x_BChw).flatten(2).transpose(1, 2)
        q, k, v = (part[:, None] for part in self.qkv(cells).chunk(3, -1))
        found = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x_BChw + found.transpose(1, 2).unflatten(2, x_BChw.shape[-2:])


class SegDM(nn.Module):
    """Predicts the clean label bits s0 from noisy ones (analog bits predict what is clean, not the noise).

    Args:
        bits: N.
        latent_channels: of z_lr.
        token_width: D of the tagger's tokens.
        token_channels: what they are narrowed to.
        widths: channels of the levels, multiples of 8, each half as large as the one before.
    """

    def __init__(
        self, *, bits: int, latent_channels: int, token_width: int, token_channels: int, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        time = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.tokens = nn.Conv2d(token_width, token_channels, 1)
        self.conv_in = nn.Conv2d(bits + latent_channels + token_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(ResBlock(width, width, time) for width in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.middle = nn.ModuleList([SelfAttention(widths[-1]), ResBlock(widths[-1], widths[-1], time)])
        self.up = nn.ModuleList(ResBlock(2 * width, width, time) for width in reversed(widths))
        self.widen = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in reversed(list(pairwise(widths))))
        self.norm_out, self.conv_out = nn.GroupNorm(_GROUPS, widths[0]), nn.Conv2d(widths[0], bits, 3, padding=1)

    def features(self, z_lr: Tensor, tokens_BLD: Tensor) -> Tensor:
        """F_lq, what the LR photo shows of the layout: z_lr (B, C, h, w) and DAPE's tokens on its grid, together.

        The first token is the mean of the others and is left out.
        """
        side = round((tokens_BLD.shape[1] - 1) ** 0.5)
        grid = self.tokens(tokens_BLD[:, 1:].transpose(1, 2).unflatten(2, (side, side)))
        fitted = F.interpolate(grid, z_lr.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([z_lr.to(fitted), fitted], 1)

    def forward(self, noisy_BNhw: Tensor, features: Tensor, acp_B: Tensor, image: Tensor | None = None) -> Tensor:
        """ŝ0 (B, N, h, w), bits in units of ±1.

        Args:
            noisy_BNhw: S_t.
            features: F_lq of `features`.
            acp_B: ᾱ_t of each picture.
            image: I_t of the bridge (B, widths[0], h, w), added to the input features; None is none.
        """
        x = self.conv_in(torch.cat([noisy_BNhw, features], 1))
        x = x if image is None else x + image
        time = self.time(time_features(acp_B, self.conv_in.out_channels).to(x.dtype))
        kept = []
        for index, block in enumerate(self.down):
            x = block(self.shrink[index - 1](x) if index else x, time)
            kept.append(x)
        attention, block = self.middle
        x = block(attention(x), time)
        for index, block in enumerate(self.up):
            skip = kept.pop()
            x = self.widen[index - 1](F.interpolate(x, skip.shape[-2:], mode="nearest")) if index else x
            x = block(torch.cat([x, skip], 1), time)
        found: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return found
