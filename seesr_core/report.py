"""What is told about an upscaled photo."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .dape import Tag
from .pictures.sizes import Sizes
from .runtime.memory import Phase
from .settings import UpscaleSettings


@dataclass(kw_only=True, slots=True)
class Report:
    """What happened to one photo."""

    model: str
    """Name of the model."""
    device: str
    """Where the networks ran."""
    dtype: str
    """Precision of U-Net and ControlNet."""
    sizes: Sizes
    """The sizes the picture went through, in pixels."""
    timesteps: list[int]
    """The timesteps that were run."""
    tiles: int
    """Tiles a step."""
    settings: UpscaleSettings
    """Settings as used; `seed` is this photo's own."""
    phases: list[Phase] = field(default_factory=list)
    """Seconds and peak memory of each phase, of the whole batch."""

    tags: list[Tag] = field(default_factory=list)
    """Tags with scores."""
    prompt: str = ""
    """The text that the U-Net read."""

    def of_photo(self, index: int, tags: list[Tag], prompt: str) -> Report:
        """The report of photo `index` of the batch that this one is about."""
        settings = replace(self.settings, seed=self.settings.seed + index)
        return replace(self, tags=tags, prompt=prompt, settings=settings)

    @property
    def seconds(self) -> float:
        """All phases together."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def peak_bytes(self) -> int | None:
        """The largest peak; None where unknown."""
        return max((phase.peak_bytes for phase in self.phases if phase.peak_bytes is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = {name: getattr(self, name) for name in ("model", "device", "dtype", "prompt", "timesteps", "tiles")}
        nested = {name: asdict(getattr(self, name)) for name in ("sizes", "settings")}
        lists = {name: [asdict(item) for item in getattr(self, name)] for name in ("tags", "phases")}
        return {**plain, **nested, **lists, "seconds": self.seconds, "peak_bytes": self.peak_bytes}
