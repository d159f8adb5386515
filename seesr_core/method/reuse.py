"""What a run keeps of the ControlNet's work: what its image encoder finds, which no step changes, and one output of
it for several steps, since from step to step its residuals change far less than the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

ROOM = 64 * 2**20
"""Bytes that a run keeps of its embeddings."""
_Output = TypeVar("_Output")


@dataclass(kw_only=True, slots=True)
class Embeddings:
    """What the ControlNet's image encoder finds in the parts of a run's picture: asked once, as far as there is room.

    The same call gives the same numbers, so results are bit for bit those of asking in every step.
    """

    room: int = ROOM
    """Bytes that may still be kept."""
    _kept: dict[Hashable, Tensor] = field(default_factory=dict)

    def __call__(self, part: Hashable, image: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The embedding (B, first width, h, w), or None once there is no more room: the ControlNet then makes its own.

        Args:
            part: what tells the parts of the picture apart; a batch of another size is another one.
            image: the part, (B, 3, 8h, 8w) in [0, 1].
            encoder: the ControlNet's.
        """
        key = (part, len(image))
        if key in self._kept:
            return self._kept[key]
        if self.room <= 0:
            return None
        found = encoder(image)
        self.room -= found.numel() * found.element_size()
        if self.room >= 0:
            self._kept[key] = found
        return found


@dataclass(kw_only=True, slots=True)
class StepReuse(Generic[_Output]):
    """What one run of a sampler keeps of a network's outputs.

    A step is a noise level: as long as it stays the same, any number of calls (tiles, prompts) belong to one step.
    Every `steps`-th step computes anew, beginning with the first, and the steps up to the next one take its outputs.
    """

    steps: int
    """How many steps an output serves, at least 1."""
    _level: float | None = None
    _count: int = -1
    _kept: dict[Hashable, _Output] = field(default_factory=dict)

    def __call__(self, level: float, key: Hashable, compute: Callable[[], _Output]) -> _Output:
        """The output for a call, from an earlier step or from `compute`.

        Args:
            level: the noise level of the step, in any unit: a sigma or a timestep.
            key: what tells the calls of a step apart; a call that the earlier step did not make is computed.
            compute: runs the network.
        """
        if level != self._level:
            self._level, self._count = level, self._count + 1
            if self._count % self.steps == 0:
                self._kept.clear()
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]
