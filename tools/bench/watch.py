"""Notes what a case takes while it runs, phase by phase, and tells what is known after each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from .case import Cost, Row
from .peak import Peak


def tell(line: str) -> None:
    """A line to standard output, where tables and results go."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(slots=True)
class Watch:
    """What was noted so far; a phase that comes again adds to what it took before."""

    row: Row = field(default_factory=Row)
    aloud: bool = True
    """Whether what is known is told at both ends of every phase, for whoever waits for the process."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside belongs to phase `name`."""
        before = self.row.phases.get(name)

        def note(peak: Peak) -> None:
            cost = Cost(seconds=peak.seconds, busy=peak.busy, held_mib=peak.held, peak_mib=peak.mib)
            self.row.phases[name] = cost if before is None else _sum(before, cost)
            self.say()

        with Peak(note):
            yield

    @contextmanager
    def counting(self, **networks: Any) -> Iterator[None]:
        """Counts calls of the networks inside."""

        def note(name: str) -> Any:
            def hook(_module: Any, args: Any, kwargs: Any) -> None:
                given = args[0] if args else kwargs["x"]
                self.row.calls[name] = self.row.calls.get(name, 0) + 1
                self.row.latents[name] = self.row.latents.get(name, 0) + len(given)

            return networks[name].register_forward_pre_hook(hook, with_kwargs=True)

        hooks = [note(name) for name in networks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def say(self) -> None:
        """Tell what is known."""
        if self.aloud:
            tell(json.dumps(asdict(self.row)))


def _sum(one: Cost, other: Cost) -> Cost:
    return Cost(
        seconds=one.seconds + other.seconds,
        busy=one.busy + other.busy,
        held_mib=one.held_mib,
        peak_mib=max(one.peak_mib, other.peak_mib),
    )
