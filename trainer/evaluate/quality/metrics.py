"""The metrics of the paper's Table 2 and one more, by name: what each needs and which way is better.

How they are computed is told by the build that computes them (`builds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from seesr_core.errors import SettingsError

from ..report.tables import Column


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One figure."""

    key: str
    """Name of the metric in options and reports."""
    label: str
    """Name of the metric as people write it."""
    paper: str = ""
    """Name of the metric in the paper's tables; empty for one that the paper lacks."""
    lower_is_better: bool = False
    """Whether lower figures are better."""
    needs_original: bool = False
    """Whether the metric compares with HR."""
    of_set: bool = False
    """Whether it is one figure of the whole set instead of a mean over pictures."""
    digits: int = 4
    """Digits after the point in tables, as in the paper."""
    pyiqa: str = ""
    """Name of the metric in pyiqa; empty for one that only this project computes."""
    pyiqa_options: Mapping[str, Any] = field(default_factory=dict)
    """Further options for pyiqa."""

    @property
    def title(self) -> str:
        """Heading of the metric's column."""
        return f"{self.label} {'↓' if self.lower_is_better else '↑'}"

    @property
    def column(self) -> Column:
        """Column of the metric in tables."""
        return Column(key=self.key, title=self.title, digits=self.digits)


DEEP = "efficientnet_lite0"
"""The distance of `trainer.deep_features`."""
_LUMA = {"test_y_channel": True, "color_space": "ycbcr"}

METRICS = (
    Metric(
        key="psnr_y", label="PSNR-Y", paper="PSNR", needs_original=True, digits=2, pyiqa="psnr", pyiqa_options=_LUMA
    ),
    Metric(key="ssim_y", label="SSIM-Y", paper="SSIM", needs_original=True, pyiqa="ssim", pyiqa_options=_LUMA),
    Metric(key="lpips", label="LPIPS", paper="LPIPS", needs_original=True, lower_is_better=True, pyiqa="lpips"),
    Metric(key="dists", label="DISTS", paper="DISTS", needs_original=True, lower_is_better=True, pyiqa="dists"),
    Metric(
        key="fid",
        label="FID",
        paper="FID",
        needs_original=True,
        lower_is_better=True,
        of_set=True,
        digits=2,
        pyiqa="fid",
    ),
    Metric(key="niqe", label="NIQE", paper="NIQE", lower_is_better=True, pyiqa="niqe"),
    Metric(key="maniqa", label="MANIQA", paper="MANIQA", pyiqa="maniqa-pipal"),
    Metric(key="musiq", label="MUSIQ", paper="MUSIQ", digits=2, pyiqa="musiq"),
    Metric(key="clipiqa", label="CLIP-IQA", paper="CLIPIQA", pyiqa="clipiqa"),
    Metric(key=DEEP, label="EfficientNet-Lite0", needs_original=True, lower_is_better=True),
)
"""In the order of Table 2, then what the paper lacks. The paper does not name its builds; these are pyiqa's that its
field settled on."""

BY_KEY: Mapping[str, Metric] = {metric.key: metric for metric in METRICS}


def choose_metrics(names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of these names, in the order of the table; all of them for none.

    Raises:
        SettingsError: an unknown name.
    """
    unknown = [name for name in names if name not in BY_KEY]
    if unknown:
        raise SettingsError(f"Unknown metrics {', '.join(unknown)}: choose some of {', '.join(BY_KEY)}.")
    return tuple(metric for metric in METRICS if not names or metric.key in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a figure depends on besides the pictures; printed beside it."""

    build: str
    """Name and version of the code that computes the metric."""
    colour: str
    """Colour space and levels."""
    resize: str = "none"
    """Whether and how the metric resizes pictures itself."""
    weights: str = "none"
    """Short SHA-256 of the metric's parameters."""
    remark: str = ""
    """What else one must know of the metric."""


class Outcome(NamedTuple):
    """A figure, or why there is none: never a zero for an unknown."""

    value: float | None
    """The figure; None if it is missing."""
    why: str = ""
    """Why the figure is missing."""


class Build(Protocol):
    """Computes one metric of pictures, uint8 RGB (3, H, W)."""

    @property
    def facts(self) -> Facts:
        """Facts of how the metric is computed."""
        ...

    def measure(self, pictures: Sequence[Tensor], originals: Sequence[Tensor]) -> list[Outcome]:
        """One outcome a picture; all have one size. `originals` is empty for metrics that need none."""
        ...


class SetBuild(Protocol):
    """Computes one metric of a whole set."""

    @property
    def facts(self) -> Facts:
        """Facts of how the metric is computed."""
        ...

    def measure_set(self, pictures: Path, originals: Path) -> Outcome:
        """The figure from two folders of PNG."""
        ...
