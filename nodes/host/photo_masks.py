"""Masks of several photos in one MASK batch: which are whose."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_COUNTS = "seesr_counts"
"""What such a batch carries; nodes in between that make new masks leave it behind."""


def of_photos(masks_NHW: Tensor, counts: Sequence[int]) -> Tensor:
    """The masks, knowing that the first `counts[0]` are the first photo's, and so on."""
    setattr(masks_NHW, _COUNTS, tuple(counts))
    return masks_NHW


def by_photo(given_NHW: Tensor, masks_NHW: Tensor) -> list[Tensor]:
    """`masks_NHW` photo by photo, if `given_NHW`, of which they were made, knows its photos; else all in one."""
    counts = getattr(given_NHW, _COUNTS, ())
    return list(masks_NHW.split(counts)) if sum(counts) == len(masks_NHW) and len(counts) > 1 else [masks_NHW]
