"""Training pairs: crops of photos in, degraded and clean images out, the same ones whenever the same numbers ask."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import seeded
from .degradation import DegradationConfig, GeneratorDraws, Pair, degrade


def make_pairs(
    hr_B3HW: Tensor, config: DegradationConfig, *, numbers: tuple[int, ...], group: int, device: torch.device
) -> Pair:
    """Degrade crops on `device`, in float32 also within autocast.

    Args:
        hr_B3HW: crops, uint8.
        config: of the degradation.
        numbers: what all draws derive from, such as (seed, stream, step).
        group: crops that share the decisions which the degradation makes once a batch (resizes, kinds of noise, order).
            At 1 every image decides alone, as in the published training, where the set was degraded beforehand.
        device: where to compute.

    Returns:
        RGB in [0, 1]; `lr_upsampled` is clamped.
    """
    hr = hr_B3HW.to(device).float().div(255)
    with torch.autocast(device.type, enabled=False):
        parts = [
            degrade(part, config, GeneratorDraws(seeded(*numbers, index))) for index, part in enumerate(hr.split(group))
        ]
    lr, hr_usm, lr_upsampled = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("lr", "hr_usm", "lr_upsampled")
    )
    return Pair(lr=lr, hr_usm=hr_usm, lr_upsampled=lr_upsampled.clamp(0, 1))
