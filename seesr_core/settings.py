"""Every choice of an upscaling run, checked once; a model file may bring its own defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL.Image import Image

from .errors import SettingsError
from .method.color import COLOR_FIXES, ColorFix
from .method.guidance import SPATIAL_GUIDANCE, SpatialGuidance, guides
from .method.sampling import SOLVERS, START_POINTS, Solver, StartPoint
from .method.schedule import LAST_TIMESTEP, SPACINGS, Spacing, timesteps
from .pictures.sizes import MULTIPLE, Size, final_size
from .pictures.target import TargetSize
from .tiling.grid import LAYOUTS, Layout
from .tiling.prompts import LOCAL_PROMPTS, LocalPrompts

MAX_SCALE = 64.0
MAX_SEED = 2**63 - 1
MAX_CONTROL_REUSE = 10

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "fast": {"steps": 10, "cfg_start": 0.2, "cfg_end": 0.8, "control_reuse": 2},
    "turbo": {"steps": 2, "cfg": 1.0, "spacing": "trailing"},
}
"""Named ways to sample, each over the published one: "turbo" is for SD-turbo as the base model; "fast" was chosen by
`python -m trainer.evaluate solvers` (docs/performance.md)."""
SAMPLING = (
    "steps",
    "cfg",
    "cfg_start",
    "cfg_end",
    "solver",
    "spacing",
    "start_timestep",
    "control_reuse",
    "color_fix",
)
"""Settings that a preset decides on, and that a model file may bring its own values for."""


@dataclass(kw_only=True, slots=True, frozen=True)
class UpscaleSettings:
    """How a photo is upscaled; the defaults are the published ones."""

    scale: float = 4.0
    """Result size over photo size, above 0."""
    steps: int = 50
    """Steps of the full schedule; only those at or below `start_timestep` are run."""
    cfg: float = 5.5
    """Guidance scale; at 1 or below the negative prompt is left out and each step costs half."""
    cfg_start: float = 0.0
    """Share of the noise schedule, from its noisy end, before which guidance does not act yet."""
    cfg_end: float = 1.0
    """Share of the noise schedule after which guidance no longer acts; such a step costs half."""
    seed: int = 0
    """Noise of the first picture; picture i of a batch uses `seed` + i."""
    start: StartPoint = "lr"
    """Start from the noised LR latent (LRE) or from pure noise."""
    start_timestep: int = LAST_TIMESTEP
    """Noise level of the LR start; a lower one keeps more of the photo."""
    spacing: Spacing = "leading"
    """How the steps lie in the schedule: as published, or as SD-turbo wants them."""
    solver: Solver = "ddpm"
    """The sampler."""
    tile: int = 768
    """Side of a denoised tile in pixels of the result, a multiple of 8; larger pictures are tiled."""
    overlap: int = 32
    """Pixels that neighbouring tiles share, a multiple of 8."""
    tile_batch: int = 0
    """Tiles denoised at once; 0 chooses 1 on a CPU and 4 elsewhere."""
    layout: Layout = "published"
    """How tiles lie: on the published grid, or balanced, as many but no larger than they must be."""
    vae_tile: int = 1024
    """Side of a tile of the autoencoder in pixels, without its surrounding."""
    min_size: int = 512
    """Photos whose upscaled shorter side lies below this are processed larger and reduced at the end."""
    color_fix: ColorFix = "adain"
    """How the result gets the photo's colours."""
    prompt: str = ""
    """The user's words, which follow the tags."""
    added_prompt: str = "clean, high-resolution, 8k"
    """Words that always follow."""
    negative: str = "dotted, noise, blur, lowres, smooth"
    """What guidance leads away from."""
    use_tags: bool = True
    """Whether the tags go into the prompt."""
    threshold: float = 1.0
    """Factor on every tag's own threshold."""
    control_scale: float = 1.0
    """Strength of the ControlNet; 0 leaves it out."""
    control_reuse: int = 1
    """How many steps one output of the ControlNet serves; the published implementation computes it in every step."""
    rca_scale: float = 1.0
    """Strength of the soft prompt; 0 leaves it out."""
    local_prompts: LocalPrompts = "off"
    """What every tile of a large result reads in its own part of the photo, beside the whole photo's prompts."""
    region_strength: float = 0.0
    """How strictly a tag's words act only where the tag is; 0 lets them act everywhere."""
    spatial_cfg: SpatialGuidance = "off"
    """"auto" guides only where some tag is."""
    fidelity: float = 0.0
    """How near the result stays to the photo, 0 to 1; 0 leaves the model free."""
    exclude: str = ""
    """Tags never to use, separated by commas."""
    to: str = ""
    """The result's size in words, see `pictures.target`; replaces `scale` photo by photo. Empty: `scale` it is."""

    def __post_init__(self) -> None:
        try:
            self._check_numbers()
            self._check_choices()
            self.denoised_timesteps()
        except TypeError as error:
            raise SettingsError(f"A setting has a value of the wrong type ({error}).") from error

    def _check_numbers(self) -> None:
        _within("scale", self.scale, 1.0 / MAX_SCALE, MAX_SCALE)
        _within("cfg", self.cfg, 0.0, 100.0)
        _within("seed", self.seed, 0, MAX_SEED)
        _within("tile batch", self.tile_batch, 0, 1024)
        _within("minimum size", self.min_size, 0, 4096)
        _within("control reuse", self.control_reuse, 1, MAX_CONTROL_REUSE)
        for name in ("fidelity", "cfg_start", "cfg_end"):
            _within(name.replace("_", " "), getattr(self, name), 0.0, 1.0)
        if self.cfg_start >= self.cfg_end:
            raise SettingsError(
                f"Guidance must end after it starts: cfg end is {self.cfg_end:g}, cfg start {self.cfg_start:g}; "
                "cfg 1 leaves guidance out."
            )
        for name in ("threshold", "control_scale", "rca_scale", "region_strength"):
            _within(name.replace("_", " "), getattr(self, name), 0.0, 10.0)
        for name, length in (("tile", self.tile), ("VAE tile", self.vae_tile)):
            _within(name, length, 8 * MULTIPLE, 65536)
        _within("overlap", self.overlap, 0, self.tile - MULTIPLE)
        for name, length in (("tile", self.tile), ("overlap", self.overlap), ("VAE tile", self.vae_tile)):
            if length % MULTIPLE:
                raise SettingsError(f"The {name} must be a multiple of {MULTIPLE} pixels, not {length}.")

    def for_photo(self, size: Size) -> UpscaleSettings:
        """These settings for a photo of (width, height) pixels: with the scale that `to` means for it.

        Raises:
            SettingsError: that scale is out of range.
        """
        return replace(self, scale=TargetSize.parse(self.to).scale_for(size)) if self.to else self

    def result_size(self, size: Size) -> Size:
        """(width, height) of the result of a photo of (width, height) pixels."""
        return TargetSize.parse(self.to).result_size(size) if self.to else final_size(size, self.scale)

    def box(self, whole: Size) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of what `to` keeps of a scaled photo of size `whole`."""
        return TargetSize.parse(self.to).box(whole) if self.to else (0, 0, *whole)

    def cut(self, picture: Image) -> Image:
        """What `to` keeps of a scaled photo."""
        return TargetSize.parse(self.to).cut(picture) if self.to else picture

    def _check_choices(self) -> None:
        if self.to:
            TargetSize.parse(self.to)
        _one_of("start", self.start, START_POINTS)
        _one_of("solver", self.solver, SOLVERS)
        _one_of("spacing", self.spacing, SPACINGS)
        _one_of("tile layout", self.layout, LAYOUTS)
        _one_of("colour fix", self.color_fix, COLOR_FIXES)
        _one_of("local prompts", self.local_prompts, LOCAL_PROMPTS)
        _one_of("spatial cfg", self.spatial_cfg, SPATIAL_GUIDANCE)
        if self.start == "noise" and self.start_timestep != LAST_TIMESTEP:
            raise SettingsError(
                f"Start 'noise' is pure noise, so the start timestep must be {LAST_TIMESTEP}, not "
                f"{self.start_timestep}; start 'lr' takes a lower one."
            )

    @classmethod
    def for_model(cls, defaults: Mapping[str, Any], **given: Any) -> UpscaleSettings:
        """The published values, over them the `defaults` that a model brings, over these what the caller has `given`.

        Raises:
            SettingsError: a value out of range, or a name that is no setting.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted((defaults.keys() | given.keys()) - known):
            raise SettingsError(f"Unknown settings {', '.join(unknown)}: expected some of {', '.join(sorted(known))}.")
        if given.get("start") == "noise" and "start_timestep" not in given:
            # A model's own start timestep speaks of the LR start.
            given["start_timestep"] = LAST_TIMESTEP
        return cls(**{**defaults, **given})

    @classmethod
    def preset(cls, name: str) -> dict[str, Any]:
        """The values of `SAMPLING` in a named preset.

        Raises:
            SettingsError: no such preset.
        """
        _one_of("preset", name, tuple(PRESETS))
        published = cls()
        return {setting: PRESETS[name].get(setting, getattr(published, setting)) for setting in SAMPLING}

    @property
    def cfg_interval(self) -> tuple[float, float]:
        """Shares of the noise schedule between which guidance acts."""
        return self.cfg_start, self.cfg_end

    def halves(self) -> list[int]:
        """How many predictions each step makes of a latent: two where guidance acts, else one."""
        return [1 + (self.cfg > 1 and guides(self.cfg_interval, t)) for t in self.denoised_timesteps()]

    def denoised_timesteps(self) -> list[int]:
        """The timesteps that are run, falling."""
        return timesteps(self.steps, spacing=self.spacing, start_timestep=self.start_timestep)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise SettingsError(f"The {name} must be from {low:g} to {high:g}, not {value:g}.")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingsError(f"Unknown {name} {value!r}: choose one of {', '.join(choices)}.")
