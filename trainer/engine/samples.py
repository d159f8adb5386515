"""Sample pictures of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from seesr_core.runtime.files import atomic_write


def save_grid(path: Path, rows: Sequence[Tensor]) -> None:
    """Write image batches (B, 3, H, W) in [0, 1] as the rows of one PNG."""
    grid = torch.cat([torch.cat(list(row.detach().float().cpu()), dim=2) for row in rows], dim=1)
    array = grid.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary)
