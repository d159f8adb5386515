"""The Dual-Modality Bridge (DMB): each process tells the other what it has found so far.

Shape letters: B pictures, C channels, h w latent cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConditionEncoder(nn.Module):
    """An estimate and how noisy the step was that it is from → a condition; zero before any training."""

    def __init__(self, channels: int, width: int, out: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, out, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, estimate_BChw: Tensor, acp_B: Tensor) -> Tensor:
        """(B, out, h, w); `acp_B` is ᾱ of the step before."""
        noise = (1.0 - acp_B.to(estimate_BChw)).sqrt().view(-1, 1, 1, 1)
        x = torch.cat([estimate_BChw, noise.expand(len(estimate_BChw), 1, *estimate_BChw.shape[-2:])], 1)
        condition: Tensor = self.conv_out(F.silu(self.conv(F.silu(self.conv_in(x)))))
        return condition


class DualModalityBridge(nn.Module):
    """Both directions.

    Args:
        latent_channels: of the picture's latents.
        bits: channels of the segmentation's.
        width: of the encoders.
        features: channels of SegDM's input features.
        hint_channels: channels of the ControlNet's conditioning embedding.
    """

    def __init__(self, *, latent_channels: int, bits: int, width: int, features: int, hint_channels: int) -> None:
        super().__init__()
        self.image = ConditionEncoder(latent_channels, width, features)
        self.segmentation = ConditionEncoder(bits, width, hint_channels)

    def image_condition(self, z0: Tensor, acp_B: Tensor) -> Tensor:
        """I_t of SegDM, from the clean latent ẑ0 that SRDM saw in the step before."""
        condition: Tensor = self.image(z0, acp_B)
        return condition

    def segmentation_condition(self, s0: Tensor, acp_B: Tensor) -> Tensor:
        """C_t of SRDM, from the label bits ŝ0 that SegDM saw in the step before."""
        condition: Tensor = self.segmentation(s0, acp_B)
        return condition
