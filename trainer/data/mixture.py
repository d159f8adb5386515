"""Several sources of photos with weights, and the order in which their photos are drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .order import Stream, epoch_order, seeded

CYCLE = 1000
"""Images within which the weights are kept exactly."""


@dataclass(frozen=True, slots=True)
class Source:
    """One of several sources."""

    name: str
    """Name of the source for messages."""
    weight: float
    """Share of the images drawn from this source, relative to the other weights."""


class WeightedOrder:
    """Which item is drawn as number n, when items come from groups with weights.

    Within `CYCLE` images every group has its share of places, rounded, in an order of their own; within a group every
    item is drawn once before any is drawn again.

    Args:
        groups: the items of each group, as indices.
        weights: of each group.
        seed: of all orders.
    """

    def __init__(self, groups: Sequence[Sequence[int]], weights: Sequence[float], seed: int) -> None:
        self.groups, self.seed = [tuple(group) for group in groups], seed
        self.places = shares(weights, CYCLE)

    def __call__(self, number: int) -> int:
        """The item drawn as `number`."""
        cycle, position = divmod(number, CYCLE)
        group, rank = _cycle(tuple(self.places), self.seed, cycle)[position]
        items = self.groups[group]
        return items[epoch_order(cycle * self.places[group] + rank, len(items), self.seed + group + 1)]


def shares(weights: Sequence[float], places: int) -> list[int]:
    """Whole places in proportion to the weights, by the largest remainder; their sum is `places`."""
    exact = [weight * places / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for index in by_rest[: places - sum(whole)]:
        whole[index] += 1
    return whole


@functools.lru_cache(maxsize=4)
def _cycle(places: tuple[int, ...], seed: int, cycle: int) -> list[tuple[int, int]]:
    """The group at each place of a cycle, and how many of that group's places come before."""
    groups = [group for group, count in enumerate(places) for _ in range(count)]
    order = torch.randperm(len(groups), generator=seeded(seed, Stream.MIXTURE, cycle)).tolist()
    seen = [0] * len(places)
    result = []
    for place in order:
        group = groups[place]
        result.append((group, seen[group]))
        seen[group] += 1
    return result
