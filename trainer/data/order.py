"""Random streams and orders that depend on numbers alone, whoever asks for them and when."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator for a tuple of numbers such as (seed, stream, step); different tuples give unrelated streams."""
    # SeedSequence ignores zeros at the end, so the count goes in front.
    entropy = [len(numbers), *(number & 0xFFFFFFFF for number in numbers)]
    state = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def by_image(*numbers: int, images: Iterable[int]) -> list[torch.Generator]:
    """A generator for each image, which depends on `numbers` and on the number of the image."""
    return [seeded(*numbers, image) for image in images]


def epoch_order(number: int, count: int, seed: int) -> int:
    """Which of `count` items is drawn as number `number`: each once an epoch, every epoch in an order of its own."""
    epoch, position = divmod(number, count)
    return int(_epoch(count, seed, epoch)[position])


@functools.lru_cache(maxsize=8)
def _epoch(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=seeded(seed, 1, epoch))
