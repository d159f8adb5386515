"""The losses of both training stages (paper equations 1 and 2), in float32 whatever the networks compute in.

Shape letters: B images, L tokens of the soft prompt, D their width, N tags.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PromptLoss(NamedTuple):
    """Equation 1 and its two parts, scalars."""

    total: Tensor
    """What is minimised: `tokens + weight · logits`."""
    tokens: Tensor
    """Mean squared error of the soft prompts."""
    logits: Tensor
    """Cross-entropy of the tag scores, in nats; its minimum is the entropy of the targets, not 0."""


def prompt_loss(
    tokens_BLD: Tensor, logits_BN: Tensor, target_tokens_BLD: Tensor, target_logits_BN: Tensor, *, weight: float = 1.0
) -> PromptLoss:
    """Equation 1: the prompts of a degraded photo against those of the clean one.

    As published, every tag is a yes/no question: binary cross-entropy of the sigmoids with soft targets, both parts
    averaged over all their elements. The logarithm is not clamped; here it is taken of the logits, so it stays finite.

    Args:
        tokens_BLD: soft prompt of the degraded photo.
        logits_BN: tag logits of the degraded photo.
        target_tokens_BLD: soft prompt of the clean photo; not differentiated.
        target_logits_BN: tag logits of the clean photo; not differentiated.
        weight: λ.
    """
    tokens = F.mse_loss(tokens_BLD.float(), target_tokens_BLD.detach().float())
    logits = F.binary_cross_entropy_with_logits(logits_BN.float(), target_logits_BN.detach().float().sigmoid())
    return PromptLoss(tokens + weight * logits, tokens, logits)


def noise_loss(pred: Tensor, noise: Tensor) -> Tensor:
    """Equation 2: mean squared error between the predicted noise and the noise that was added, unweighted; a scalar."""
    return F.mse_loss(pred.float(), noise.float())


def min_snr_weight(acp: Tensor, gamma: float) -> Tensor:
    """Weight of equation 2 at each timestep, min(SNR, γ) / SNR with SNR = ᾱ / (1 − ᾱ): that of predicted noise in Hang
    et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV 2023), of the shape of `acp`."""
    return (gamma * (1.0 - acp) / acp).clamp(max=1.0)


def noise_loss_per_image(pred: Tensor, noise: Tensor) -> Tensor:
    """Equation 2 of each image of a batch, (B,)."""
    return F.mse_loss(pred.float(), noise.float(), reduction="none").mean((1, 2, 3))
