"""What is measured: one photo's way to its picture under stated circumstances, and what it took."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PLACES = ("core", "host")
NETS = ("nano", "full", "small")
DTYPES = ("fp32", "bf16", "fp16")
KINDS = ("tiled", "balanced", "nodes", "untiled", "three-passes")
HOSTS_KINDS = ("nodes", "three-passes")
PHASES = ("prompts", "prepare", "encode", "sample", "decode", "finish")
SAMPLE = "sample"
SCALE = 4
CFG = 5.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the table."""

    place: str = "host"
    """Outside ComfyUI ("core") or inside ("host")."""
    net: str = "nano"
    """The embedded model, or networks by the rule: published sizes ("full"), or tiny ones for tests ("small")."""
    dtype: str = "fp32"
    """Precision of the networks."""
    kind: str = "tiled"
    """How the picture is sampled: in tiles as published, in balanced ones, through the small nodes, or whole;
    "three-passes" as "tiled", but large pictures pass the autoencoder in the host's own tilers."""
    side: int = 512
    """Side of the result in pixels."""
    steps: int = 2
    """Sampling steps."""
    cfg: float = CFG
    """Guidance scale."""
    tile: int = 512
    """Side of a tile in pixels."""
    alone: bool = False
    """Whether latents are drawn instead of encoded, and not decoded: the sampling alone."""

    @property
    def name(self) -> str:
        """What tells it from other cases; the key in reports."""
        extra = [f"{self.steps} steps", f"cfg {self.cfg:g}", *(["sampling only"] if self.alone else [])]
        return ", ".join([self.place, self.net, self.dtype, self.kind, f"{self.side} px", f"tile {self.tile}", *extra])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def cases(
    places: Sequence[str],
    nets: Sequence[str],
    dtypes: Sequence[str],
    sides: Sequence[int],
    kinds: Sequence[str],
    **same: Any,
) -> Iterator[Case]:
    """Every combination that there is: `HOSTS_KINDS` are the host's only."""
    for place, net, dtype, side, kind in itertools.product(places, nets, dtypes, sides, kinds):
        if kind in HOSTS_KINDS and place != "host":
            continue
        yield Case(place=place, net=net, dtype=dtype, side=side, kind=kind, **same)


@dataclass(kw_only=True, slots=True)
class Cost:
    """What a phase took."""

    seconds: float = 0.0
    """By the wall; 0 if it did not end."""
    busy: float = 0.0
    """Processor time over all threads: what other work on the machine does not change."""
    held_mib: float = 0.0
    """Memory before it: of the process (CPU), or of the allocator (GPU)."""
    peak_mib: float = 0.0
    """Peak of memory in it."""


@dataclass(kw_only=True, slots=True)
class Row:
    """What a case took, as far as it came."""

    device: str = ""
    """Where the networks ran."""
    phases: dict[str, Cost] = field(default_factory=dict)
    """By name; those that ended, and the one that was begun."""
    calls: dict[str, int] = field(default_factory=dict)
    """Calls of each network while sampling."""
    latents: dict[str, int] = field(default_factory=dict)
    """Latents that each network was given in all calls."""
    done: bool = False
    """Whether all of it ended."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """Inverse of `dataclasses.asdict`."""
        return cls(**{**data, "phases": {name: Cost(**cost) for name, cost in data["phases"].items()}})

    @property
    def sampling(self) -> Cost:
        """The sampling's part."""
        return self.phases.get(SAMPLE, Cost())

    @property
    def whole(self) -> Cost:
        """All phases together."""
        costs = list(self.phases.values())
        return Cost(
            seconds=sum(cost.seconds for cost in costs),
            busy=sum(cost.busy for cost in costs),
            held_mib=costs[0].held_mib if costs else 0.0,
            peak_mib=max((cost.peak_mib for cost in costs), default=0.0),
        )

    def shares(self) -> dict[str, float]:
        """Share of the processor time of each phase."""
        total = self.whole.busy
        return {name: cost.busy / total for name, cost in self.phases.items()} if total else {}
