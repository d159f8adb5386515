"""Every constant and probability of the degradation; the defaults are the published training settings of SeeSR.

Ranges are (low, high) pairs from which a value is drawn evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from seesr_core.errors import SettingsError

Range = tuple[float, float]
ResizeMode = Literal["area", "bilinear", "bicubic"]
KernelFamily = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]

KERNEL_FAMILIES: tuple[KernelFamily, ...] = (
    "iso",
    "aniso",
    "generalized_iso",
    "generalized_aniso",
    "plateau_iso",
    "plateau_aniso",
)
RESIZE_MODES: tuple[ResizeMode, ...] = ("area", "bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True, slots=True)
class SharpenConfig:
    """Unsharp masking of the HR photo, which is both the training target and what gets degraded."""

    weight: float = 0.5
    """Share of the difference to the blurred photo that is added back; 0 leaves the photo as it is."""
    radius: int = 50
    """Side of the Gaussian window in pixels; an even value is raised by one."""
    threshold: float = 10.0
    """Differences up to this many 8-bit levels count as texture or noise and are not sharpened."""
    fast: bool = False
    """Blur by two matrix products instead of the published convolution: many times faster on a CPU, equal to 3e-6.
    Where a difference sits on the threshold the two may decide otherwise: up to 5e-4 in the sharpened photo."""

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "sharpen weight", "not negative", self.weight)
        _require(self.radius >= 1, "sharpen radius", "at least 1 pixel", self.radius)
        _require(self.threshold >= 0, "sharpen threshold", "not negative", self.threshold)

    @property
    def window(self) -> int:
        """Side of the window as used, odd."""
        return self.radius + (self.radius % 2 == 0)

    @property
    def sigma(self) -> float:
        """Standard deviation in pixels that OpenCV gives a Gaussian window of this side (8.0 for 51)."""
        return 0.3 * ((self.window - 1) * 0.5 - 1) + 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class BlurConfig:
    """How the blur kernel of one stage is drawn, once per image."""

    sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    """Sides of the kernels in pixels, all equally probable."""
    families: tuple[KernelFamily, ...] = KERNEL_FAMILIES
    """Shapes a kernel can have when it is not a sinc."""
    family_weights: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Weight of each family, in the order of `families`."""
    sinc_probability: float = 0.1
    """How often the kernel is a circular low-pass (sinc) instead."""
    sigma: Range = (0.2, 3.0)
    """Standard deviation in pixels; drawn for each axis alone in the aniso families."""
    rotation: Range = (-math.pi, math.pi)
    """Angle of the first axis in radians (aniso families)."""
    generalized_beta: Range = (0.5, 4.0)
    """Exponent of the generalized families: evenly below or above 1 with equal probability."""
    plateau_beta: Range = (1.0, 2.0)
    """Exponent of the plateau families, drawn like `generalized_beta`: by default half the values are exactly 1."""
    sinc_cutoff: Range = (math.pi / 3, math.pi)
    """Cut-off of small sincs in radians per pixel."""
    large_sinc_cutoff: Range = (math.pi / 5, math.pi)
    """Cut-off of sincs of `large_sinc_size` pixels and more."""
    large_sinc_size: int = 13
    """Smallest side at which a sinc counts as large."""

    def __post_init__(self) -> None:
        _check_sizes(self.sizes)
        unknown = sorted(set(self.families) - set(KERNEL_FAMILIES))
        _require(not unknown, "kernel families", f"among {', '.join(KERNEL_FAMILIES)}", unknown)
        _check_weights(self.family_weights, len(self.families), "family_weights")
        _check_probability(self.sinc_probability, "sinc_probability")
        for name in ("sigma", "generalized_beta", "plateau_beta", "sinc_cutoff", "large_sinc_cutoff"):
            _check_range(getattr(self, name), name, above=0.0)
        _check_range(self.rotation, "rotation")
        for name in ("generalized_beta", "plateau_beta"):
            low, high = getattr(self, name)
            _require(low <= 1 <= high, name, "a range with 1 in it", (low, high))


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalSincConfig:
    """The low-pass that imitates ringing, at LR size and just before or just after the last JPEG."""

    probability: float = 0.8
    """How often an image gets it; the others pass unchanged."""
    sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)
    """Sides of the kernel in pixels, all equally probable."""
    cutoff: Range = (math.pi / 3, math.pi)
    """Cut-off in radians per pixel."""
    before_jpeg_probability: float = 0.5
    """How often resize and sinc come before the last JPEG; else they follow it."""

    def __post_init__(self) -> None:
        _check_probability(self.probability, "final sinc probability")
        _check_sizes(self.sizes)
        _check_range(self.cutoff, "final sinc cutoff", above=0.0)
        _check_probability(self.before_jpeg_probability, "before_jpeg_probability")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One round of blur, resize, noise and JPEG; the defaults are the first round's."""

    blur: BlurConfig = field(default_factory=BlurConfig)
    """Kernels of this round."""
    blur_probability: float = 1.0
    """How often a batch is blurred; at 1 nothing is drawn for it."""
    resize_weights: tuple[float, float, float] = (0.2, 0.7, 0.1)
    """Weights of up, down and keep."""
    resize_range: Range = (0.15, 1.5)
    """Smallest scale of down and largest scale of up; relative to HR in the first round, to LR in the second."""
    gaussian_probability: float = 0.5
    """How often the noise is Gaussian; else it is Poisson."""
    gaussian_sigma: Range = (1.0, 30.0)
    """Standard deviation of Gaussian noise in 8-bit levels."""
    poisson_scale: Range = (0.05, 3.0)
    """Factor on the Poisson noise; 1 is the shot noise of as many photons as the image has levels."""
    gray_probability: float = 0.4
    """How often the noise of an image is the same in all three channels."""
    jpeg_quality: Range = (30.0, 95.0)
    """JPEG quality on the scale of libjpeg, not rounded."""

    def __post_init__(self) -> None:
        for name in ("blur_probability", "gaussian_probability", "gray_probability"):
            _check_probability(getattr(self, name), name)
        _check_weights(self.resize_weights, 3, "resize_weights")
        _check_range(self.resize_range, "resize_range", above=0.0)
        low, high = self.resize_range
        _require(low <= 1 <= high, "resize_range", "a range with 1 in it", (low, high))
        _check_range(self.gaussian_sigma, "gaussian_sigma")
        _check_range(self.poisson_scale, "poisson_scale")
        _check_range(self.jpeg_quality, "jpeg_quality", above=0.0)
        _require(self.jpeg_quality[1] < 100, "jpeg_quality", "below 100, where the step size is 0", self.jpeg_quality)


def published_second_stage() -> StageConfig:
    """The second round of the published settings: milder, and skipping its blur now and then."""
    return StageConfig(
        blur=BlurConfig(sigma=(0.2, 1.5)),
        blur_probability=0.8,
        resize_weights=(0.3, 0.4, 0.3),
        resize_range=(0.3, 1.2),
        gaussian_sigma=(1.0, 25.0),
        poisson_scale=(0.05, 2.5),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DegradationConfig:
    """The whole second-order degradation. The crop size is that of the batch it is given."""

    scale: int = 4
    """HR side divided by LR side, rounded down."""
    sharpen: SharpenConfig = field(default_factory=SharpenConfig)
    """Sharpening of the HR photo."""
    first: StageConfig = field(default_factory=StageConfig)
    """First round, on the HR photo."""
    second: StageConfig = field(default_factory=published_second_stage)
    """Second round, at about LR size."""
    final_sinc: FinalSincConfig = field(default_factory=FinalSincConfig)
    """Resize to LR size and last low-pass."""
    resize_modes: tuple[ResizeMode, ...] = RESIZE_MODES
    """Interpolations of every resize, all equally probable."""
    kernel_canvas: int = 21
    """Odd side to which all kernels are padded with zeros, so that the images of a batch share one convolution."""
    clean_probability: float = 0.0
    """How often an image is only shrunk (area), not degraded; at 0 nothing is drawn for it. The published settings say
    0.01 (`no_degradation_prob`), but the published code never reads it."""
    quantize: bool = False
    """Round the results to 8 bits, as the published training set is saved."""

    def __post_init__(self) -> None:
        _require(self.scale >= 1, "scale", "at least 1", self.scale)
        _check_probability(self.clean_probability, "clean_probability")
        unknown = sorted(set(self.resize_modes) - set(RESIZE_MODES))
        _require(bool(self.resize_modes) and not unknown, "resize_modes", f"among {', '.join(RESIZE_MODES)}", unknown)
        largest = max((*self.first.blur.sizes, *self.second.blur.sizes, *self.final_sinc.sizes))
        fits = self.kernel_canvas % 2 == 1 and self.kernel_canvas >= largest
        _require(fits, "kernel_canvas", f"odd and at least the largest kernel ({largest})", self.kernel_canvas)

    @property
    def min_side(self) -> int:
        """Smallest HR side in pixels of which every intermediate image keeps at least one pixel."""
        return max(math.ceil(1 / self.first.resize_range[0]), math.ceil(self.scale / self.second.resize_range[0]))


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    if not condition:
        raise SettingsError(f"Degradation setting {name} must be {expected}, found {found}. Correct it in the recipe.")


def _check_probability(value: float, name: str) -> None:
    _require(0 <= value <= 1, name, "a probability from 0 to 1", value)


def _check_range(value: Range, name: str, *, above: float | None = None) -> None:
    _require(len(value) == 2 and value[0] <= value[1], name, "a (low, high) pair with low <= high", value)
    limit = -math.inf if above is None else above
    _require(value[0] > limit, name, f"above {limit:g}", value)


def _check_weights(weights: tuple[float, ...], count: int, name: str) -> None:
    valid = len(weights) == count and all(weight >= 0 for weight in weights) and sum(weights) > 0
    _require(valid, name, f"{count} weights, none negative, not all 0", weights)


def _check_sizes(sizes: tuple[int, ...]) -> None:
    valid = bool(sizes) and all(size >= 1 and size % 2 == 1 for size in sizes)
    _require(valid, "kernel sizes", "a list of odd sides", sizes)
