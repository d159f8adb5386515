"""The terms by which a student of few steps learns, each by itself, in float32.

Symbols: ẑ is the student's clean latent, z_t = √ᾱ_t·ẑ + √(1 − ᾱ_t)·ε its noised one, ε_real and ε_fake what two
networks take the noise in z_t for, (B, C, h, w) all of them. Pictures are (B, 3, H, W) in [−1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seesr_core.method.schedule import x0_from_eps

from ..deep_features import distance

_SOFT = 0.01
"""Errors of pictures below this count squared, larger ones as they are."""
_SOFT_LATENT = 0.1
_FLOOR = 1e-5


def charbonnier(result: Tensor, target: Tensor | None = None, epsilon: float = _SOFT) -> Tensor:
    """Mean of √(e² + ε²) − ε over all elements of the error e = result − target (Charbonnier et al. 1994)."""
    error = result if target is None else result - target
    return (error.square() + epsilon**2).sqrt().mean() - epsilon


def picture_loss(result: Tensor, target: Tensor, *, edge_weight: float = 1.0) -> Tensor:
    """`charbonnier` of pixels, and by `edge_weight` of the differences of neighbours across and down."""
    error = result - target
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return charbonnier(error) + edge_weight / 2 * (charbonnier(across) + charbonnier(down))


def with_tones_of(picture: Tensor, other: Tensor, cell: int = 8) -> Tensor:
    """The detail of a picture on the tones of another: their means over cells of `cell` pixels are exchanged, those
    between the cells' centres bilinearly; sides are multiples of `cell`."""
    means = F.avg_pool2d(other - picture, cell)
    return picture + F.interpolate(means, scale_factor=cell, mode="bilinear")


def latent_loss(result: Tensor, target: Tensor) -> Tensor:
    """`charbonnier` of latents."""
    return charbonnier(result, target, epsilon=_SOFT_LATENT)


def deep_loss(result: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean distance of deep features (`deep_features.distance`) over a batch; those of the target are not
    differentiated."""
    return distance(result, [features.detach() for features in target]).mean()


def end_point_loss(student: Tensor, end_point: Tensor) -> Tensor:
    """Mean squared error between ẑ and where the teacher's deterministic sampling ends from the very same start.

    The distillation term of SinSR (Wang et al., CVPR 2024, arXiv:2311.14760): ‖f_θ(x_T, y, T) − F(x_T, y)‖², with F all
    steps of the teacher's sampler without noise (here DDIM, η = 0).
    """
    return (student.float() - end_point.detach().float()).square().mean()


def distribution_matching_loss(
    student: Tensor, noisy: Tensor, eps_real: Tensor, eps_fake: Tensor, acp: Tensor
) -> Tensor:
    """A term whose gradient by ẑ is the difference of two scores: it moves ẑ to where the teacher's results are likely.

    ∂L/∂ẑ = (ẑ_fake − ẑ_real) / mean|ẑ − ẑ_real|, averaged over all elements, with the clean latents that the teacher
    (real) and a network that follows the student's results (fake) see in z_t: Algorithm 2 of DMD (Yin et al., CVPR
    2024, arXiv:2311.18828), kept by DMD2 (arXiv:2405.14867); in latents as OSEDiff's regularization (Wu et al., NeurIPS
    2024, arXiv:2406.08177), which weighs otherwise. The normalization is by image.

    Args:
        student: ẑ, the only argument that is differentiated.
        noisy: z_t.
        eps_real: the teacher's noise.
        eps_fake: the follower's noise.
        acp: ᾱ_t, broadcast over the batch, (B, 1, 1, 1).
    """
    z, z_t = student.detach().float(), noisy.detach().float()
    real, fake = (x0_from_eps(z_t, eps.detach().float(), acp) for eps in (eps_real, eps_fake))
    scale = (z - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=_FLOOR)
    gradient = ((fake - real) / scale).nan_to_num()
    return (student.float() * gradient).mean()


def hinge_loss(photos: Sequence[Tensor], results: Sequence[Tensor]) -> Tensor:
    """What a critic minimises: mean of max(0, 1 − D(photo)) + max(0, 1 + D(result)), averaged over its heads (Lim and
    Ye 2017, arXiv:1705.02894)."""
    heads = [(1 - p).relu().mean() + (1 + r).relu().mean() for p, r in zip(photos, results, strict=True)]
    return torch.stack(heads).mean()


def fooling_loss(results: Sequence[Tensor]) -> Tensor:
    """What a critic's opponent minimises: −D(result), averaged over its heads."""
    return -torch.stack([judged.mean() for judged in results]).mean()


def with_gradient(value: Tensor, by: Tensor, gradient: Tensor) -> Tensor:
    """A scalar that is `value`, and whose gradient by the tensor `by` is `gradient`."""
    carrier = (by * gradient.detach()).sum()
    return value.detach() + carrier - carrier.detach()
