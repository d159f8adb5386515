"""Sample pictures of a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from seesr_core.pictures.sizes import to_u8
from seesr_core.runtime.files import atomic_write

_GAP = 4
"""Pixels beside a label."""


def save_grid(path: Path, rows: Sequence[Tensor], labels: Sequence[str] = ()) -> None:
    """Write image batches (B, 3, H, W) in [0, 1] as the rows of one PNG, each with its label at the left."""
    grid = torch.cat([torch.cat(list(row.detach().float().cpu()), dim=2) for row in rows], dim=1)
    array = to_u8(grid).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    if labels:
        picture = _labelled(picture, [row.shape[-2] for row in rows], labels)
    with atomic_write(path) as temporary:
        picture.save(temporary)


def _labelled(picture: Image.Image, heights: Sequence[int], labels: Sequence[str]) -> Image.Image:
    """The picture with a margin at its left for a label a row."""
    font = ImageFont.load_default()
    margin = 2 * _GAP + max(math.ceil(font.getlength(label)) for label in labels)
    result = Image.new("RGB", (picture.width + margin, picture.height), "white")
    result.paste(picture, (margin, 0))
    draw, top = ImageDraw.Draw(result), 0
    for label, height in zip(labels, heights, strict=True):
        draw.text((_GAP, top + height / 2), label, fill="black", font=font, anchor="lm")
        top += height
    return result
