"""A critic that learns to tell restored pictures from photos, while the networks learn to pass for photos.

Heads stand on the frozen features of another network, as in Projected GANs (Sauer et al., NeurIPS 2021,
arXiv:2111.01007), and one on the pixels, which sees fine weaves that strided features pass over. All of them see the
enlarged LR photo beside the picture, so what is judged is what was made of this photo. Shape letters: B batch, H, W
pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

_CHANNELS = (16, 24, 40)
"""Channels of the features that are judged: the first of `deep_features.TAPS`."""
_WIDTH, _SLOPE = 64, 0.2
_FLOOR = 0.01


class Critic(nn.Module):
    """Judges every place of a picture: high for photos, low for what was restored.

    Args:
        with_features: whether there are heads on deep features beside the one on pixels.
    """

    def __init__(self, *, with_features: bool) -> None:
        super().__init__()
        channels = _CHANNELS if with_features else ()
        self.heads = nn.ModuleList(_layers((2 * c, 1, 1), (_WIDTH, 3, 1)) for c in channels)
        self.pixels = _layers((6, 3, 1), (_WIDTH // 2, 4, 2), (_WIDTH, 3, 1))

    def forward(
        self, picture: Tensor, condition: Tensor, features: Sequence[Tensor] = (), seen: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Judgements (B, 1, h, w), one of each head.

        Args:
            picture: what is judged (B, 3, H, W) in [−1, 1].
            condition: the enlarged LR photo in the same form.
            features: deep features of the picture.
            seen: deep features of the enlarged LR photo.
        """
        judged = [self.pixels(torch.cat([picture, condition], 1))]
        pairs = zip(self.heads, features, seen, strict=False)
        return judged + [head(torch.cat([_even(a), _even(b)], 1)) for head, a, b in pairs]


def _layers(*convolutions: tuple[int, int, int]) -> nn.Sequential:
    """Convolutions (channels, kernel, stride) with bounded gain (Miyato et al. 2018), and a last one to a judgement."""
    outs = [*(channels for channels, _, _ in convolutions[1:]), _WIDTH]
    layers: list[nn.Module] = []
    for (channels, kernel, stride), out in zip(convolutions, outs, strict=True):
        conv = nn.Conv2d(channels, out, kernel, stride, padding=(kernel - 1) // 2)
        layers += [spectral_norm(conv), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(_WIDTH, 1, 1)))


def _even(features_BCHW: Tensor) -> Tensor:
    """Features of one mean square at every place."""
    return features_BCHW / (features_BCHW.square().mean(1, keepdim=True) + _FLOOR).sqrt()
