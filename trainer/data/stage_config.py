"""What both stages say about their photos: crops, degradation, and batches that are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from seesr_core.errors import SettingsError

from ..degradation import DegradationConfig
from ..engine.loop_config import LoopConfig


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Settings that stage 1 and stage 2 share; the defaults are the published values."""

    loop: LoopConfig
    """Settings of the optimisation."""
    crop: int = 512
    """Side of the HR crops in pixels, in stage 2 a multiple of 64; they are degraded at this size."""
    min_scale: float = 1.0
    """Photos are shrunk by a random factor between this and 1 before cropping; 0 goes down to the size of the crop."""
    smallest_photo: int = 0
    """Photos with a shorter side than this are skipped; smaller ones than the crop are enlarged to it."""
    skip_grey: bool = False
    """Whether photos without colour are skipped."""
    fixed_crops: bool = False
    """Whether a photo is cropped and flipped alike whenever it is drawn, so that a cache knows the crop again."""
    degradation: DegradationConfig = field(default_factory=lambda: DegradationConfig(quantize=True))
    """How the LR photos are made; by default rounded to 8 bits, as the published set was stored."""
    degradation_group: int = 1
    """Crops that are degraded together and share what the degradation decides once a batch; more is faster."""
    pool: int = 0
    """Number of batches that are prepared once (degraded, and in stage 2 seen by the frozen networks), kept and drawn
    again; 0 prepares every batch afresh. On a CPU that costs as much as the training itself or several times more."""

    def __post_init__(self) -> None:
        smallest = min(self.crop, self.degradation_group)
        require(smallest >= 1, "crop and degradation_group must be at least 1", smallest)
        require(0 <= self.min_scale <= 1, "min_scale must lie in [0, 1]", self.min_scale)
        require(self.pool >= 0, "pool must not be negative", self.pool)


def require(condition: bool, expected: str, found: object) -> None:
    """Refuse settings that cannot work.

    Raises:
        SettingsError: `condition` does not hold; the message has what was expected and what was found.
    """
    if not condition:
        raise SettingsError(f"{expected}, found {found}. Correct it in the recipe or on the command line.")
