"""One output of the ControlNet for several steps: from step to step its residuals change far less than the latent."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

_Output = TypeVar("_Output")


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
