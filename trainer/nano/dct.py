"""The code of the small model's latents: a cosine transform of 8×8 pixels, of which 16 coefficients are kept.

Twelve are luma's lowest frequencies; colour keeps its mean and two slopes on the axis orange–blue, on which photos vary
most, and its mean on the axis magenta–green. The transform is linear, so it is written exactly as weights of TAESD's
encoder, and what it keeps of a photo (37 dB of luma on sharp ones) is known before anything is trained.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

CELL = 8
"""Side of a cell in pixels: TAESD's reduction."""
LUMA = ((0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0), (0, 3), (1, 2), (2, 1), (3, 0), (0, 4), (4, 0))
"""Frequencies (down, across) that are kept of luma."""
ORANGE_BLUE, MAGENTA_GREEN = ((0, 0), (0, 1), (1, 0)), ((0, 0),)
"""Frequencies that are kept of (Cr − Cb)/√2 and of (Cr + Cb)/√2."""
CHANNELS = len(LUMA) + len(ORANGE_BLUE) + len(MAGENTA_GREEN)
SCALES = (
    *(0.1511, 0.5387, 0.5307, 0.9972, 1.023, 0.9657, 1.5135, 1.558, 1.519, 1.4827, 2.0308, 2.0662),
    *(0.3007, 1.7363, 1.748),
    0.6148,
)
"""Factors that give photos' coefficients a standard deviation of 0.6 (luma's mean), 0.5 (colours' means) and 0.4 (the
rest), well within the decoder's soft clamp at ±3."""
SCALING = 2.4
"""Factor from the code to the U-Net's latents, about the inverse of the code's standard deviation."""

_LUMA = (0.299, 0.587, 0.114)
_CB = (-0.168736, -0.331264, 0.5)
_CR = (0.5, -0.418688, -0.081312)


def analysis() -> Tensor:
    """The code as a convolution of stride 8 on pictures in [−1, 1]: (16, 3, 8, 8), float64."""
    rows = [(_axis(*which), frequency) for which, kept in _PLANES for frequency in kept]
    cosines = _cosines()
    patterns = [torch.einsum("c,y,x->cyx", axis, cosines[v], cosines[u]) for axis, (v, u) in rows]
    return torch.stack(patterns) * torch.tensor(SCALES, dtype=torch.float64).view(-1, 1, 1, 1)


def preview_factors() -> Tensor:
    """What each channel of the U-Net's latents adds to a cell's mean colour in [−1, 1]: (16, 3)."""
    means = analysis().sum((2, 3)) * SCALING
    colored = means.abs().amax(1) > 1e-9
    factors = torch.zeros_like(means)
    factors[colored] = torch.linalg.inv(means[colored]).T
    return factors


@torch.no_grad()
def write_encoder(encoder: nn.Module) -> None:
    """Make a `diffusers` EncoderTiny of 16 latent channels compute the code, exactly.

    Its input lies in [0, 1], so that every ReLU passes it on: the first two strides gather 4×4 pixels as channels, the
    third takes the coefficients of the 8×8 as pairs ReLU(+v), ReLU(−v), and the last convolution subtracts these.
    """
    layers: Any = encoder.layers
    for parameter in encoder.parameters():
        parameter.zero_()
    _pass_on(layers[0].weight, 3)
    _gather(layers[2].weight, 3)
    _gather(layers[6].weight, 12)
    weights = analysis()
    # Rows and columns of the 8×8 as (third stride, second, first); channels in the order in which `_gather` put them.
    strided = weights.view(CHANNELS, 3, 2, 2, 2, 2, 2, 2)
    pixels = strided.permute(0, 3, 6, 4, 7, 1, 2, 5).reshape(CHANNELS, 48, 2, 2)
    signed = torch.cat([pixels, -pixels])
    layers[10].weight[: 2 * CHANNELS, :48, 1:, 1:] = 2 * signed.to(layers[10].weight)
    last = layers[14]
    for channel in range(CHANNELS):
        last.weight[channel, channel, 1, 1] = 1
        last.weight[channel, CHANNELS + channel, 1, 1] = -1
    last.bias.copy_(-weights.sum((1, 2, 3)))


def _pass_on(weight: Tensor, channels: int) -> None:
    for channel in range(channels):
        weight[channel, channel, 1, 1] = 1


def _gather(weight: Tensor, channels: int) -> None:
    """2×2 pixels of `channels` become channels, (down, across, channel)."""
    for down in range(2):
        for across in range(2):
            for channel in range(channels):
                weight[(2 * down + across) * channels + channel, channel, 1 + down, 1 + across] = 1


def _cosines() -> Tensor:
    """Orthonormal cosines (frequency, position)."""
    frequency, position = (torch.arange(CELL, dtype=torch.float64) for _ in range(2))
    table = torch.cos(math.pi * frequency[:, None] * (2 * position + 1) / (2 * CELL)) * (2 / CELL) ** 0.5
    table[0] /= 2**0.5
    return table


def _axis(luma: float, cb: float, cr: float) -> Tensor:
    """A direction in red, green and blue."""
    parts = zip((luma, cb, cr), (_LUMA, _CB, _CR), strict=True)
    return torch.stack([factor * torch.tensor(row, dtype=torch.float64) for factor, row in parts]).sum(0)


_PLANES = (
    ((1.0, 0.0, 0.0), LUMA),
    ((0.0, -(0.5**0.5), 0.5**0.5), ORANGE_BLUE),
    ((0.0, 0.5**0.5, 0.5**0.5), MAGENTA_GREEN),
)
