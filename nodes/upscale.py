"""The whole method in one node: the functions of the small nodes, in their order."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.method.color import ColorFix
from ..seesr_core.method.guidance import DECAY
from ..seesr_core.settings import SAMPLING, UpscaleSettings
from .apply import apply_seesr
from .host.forecast import forecast
from .host.presets import CUSTOM, preset_input, sampling_values
from .host.report import story, tell_on_node
from .host.sampler import sample
from .host.steering import attach_fidelity, attach_guidance_interval
from .host.text import encode_text
from .host.tiling.tiles import TileSettings, tile_model
from .host.vae import decode_latent
from .image import (
    color_fix_input,
    cut_images,
    finish_images,
    prepare_levels,
    scale_for,
    scale_input,
    to_input,
    to_levels,
)
from .latent import latent_init, schedule_sigmas, seed_input, start_timestep_input, steps_input
from .local import USES, read_tiles
from .prompts import added_prompt_input, compose_text, exclude_input, extract_tags, threshold_input, words_input
from .schema import DAPEType, ModelType, folded, make_schema
from .steering import fidelity_input
from .tiled import cfg_input, overlap_input, tile_size_input

if TYPE_CHECKING:
    from .host.dape import HostDAPE
    from .host.seesr_model import SeeSRModel

log = logging.getLogger(__name__)

_PUBLISHED = UpscaleSettings()
MIN_SIZE = _PUBLISHED.min_size
"""Photos whose upscaled shorter side lies below this are processed larger and reduced at the end."""
OFF = "off"
_LOCAL = {"tags": "tags", "soft prompt": "soft prompt", "both": USES[0]}
"""Choices of `local_prompts` and what SeeSR Tile Prompts calls them."""
_OWN_NAMES = {"solver": "sampler_name", "tile": "tile_size", "negative": "negative_prompt"}
"""Settings of a model file that this node calls otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the node is connected to."""

    image: Tensor
    """Photos (B, H, W, 3 or 4)."""
    model: Any
    """The host's MODEL."""
    clip: Any
    """The host's CLIP."""
    vae: Any
    """The host's VAE."""
    dape: HostDAPE
    """The tagger."""
    seesr_model: SeeSRModel
    """ControlNet and RCA."""

    def references(self) -> list[weakref.ref[Any]]:
        """What tells whether all of it is the same as before, without keeping any of it in memory."""
        patchers = (self.dape.patcher, self.seesr_model.rca.patcher)
        return [weakref.ref(part) for part in (self.image, self.model, self.clip, self.vae, *patchers)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """All that decides on the decoded picture, beside the parts."""

    scale: float
    steps: int
    cfg: float
    cfg_start: float
    cfg_end: float
    solver: str
    spacing: Any
    control_reuse: int
    start_timestep: int
    seed: int
    prompt: str
    added_prompt: str
    negative_prompt: str
    tiles: TileSettings
    tags: str
    exclude: str
    threshold: float
    strength: float
    rca_strength: float
    local_prompts: str
    fidelity: float


@dataclass(kw_only=True, slots=True)
class Decoded:
    """What was made of photos, up to the finish."""

    parts: list[weakref.ref[Any]]
    """The parts it was made with."""
    choices: Choices
    """The choices it was made by."""
    tags: list[str]
    """A line of tags for each photo."""
    prepared: Tensor
    """Prepared photos (B, H, W, 3), uint8."""
    pictures: Tensor
    """Decoded pictures (B, H, W, 3), uint8."""


_last: list[Decoded] = []
"""The last run of the node: another colour fix of it needs no sampling."""


class SeeSRUpscale(io.ComfyNode):
    """Photo in, larger photo out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRUpscale",
            display_name="SeeSR Upscale",
            description="Upscales photos with SeeSR in one step: reads tags and soft prompt, prepares the photo, "
            "samples (tiled where it is large), decodes and finishes. Gives the same picture as the graph of the small "
            "nodes.",
            search_aliases=[
                "seesr",
                "upscale",
                "upscale photo",
                "restore photo",
                "super resolution",
                "enhance photo",
                "image upscaler",
            ],
            inputs=[*_connections(), *_sampling(), *_finishing(), *_later()],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The finished picture, the photo's size × scale."),
                io.String.Output(
                    display_name="tags", is_output_list=True, tooltip="The tags that were found, one text per picture."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        model: Any,
        clip: Any,
        vae: Any,
        dape: HostDAPE,
        seesr_model: SeeSRModel,
        scale: float,
        steps: int,
        cfg: float,
        seed: int,
        prompt: str,
        added_prompt: str,
        negative_prompt: str,
        sampler_name: str,
        start_timestep: int,
        tile_size: int,
        overlap: int,
        color_fix: ColorFix,
        local_prompts: str = OFF,
        fidelity: float = 0.0,
        preset: str = CUSTOM,
        to: str = "",
        tags: str = "",
        exclude: str = "",
        threshold: float = 1.0,
        strength: float = 1.0,
        rca_strength: float = 1.0,
    ) -> io.NodeOutput:
        """The finished pictures and their tags."""
        parts = Parts(image=image, model=model, clip=clip, vae=vae, dape=dape, seesr_model=seesr_model)
        values = {"steps": steps, "cfg": cfg, "solver": sampler_name, "spacing": "leading", "color_fix": color_fix}
        values |= {name: getattr(_PUBLISHED, name) for name in ("cfg_start", "cfg_end", "control_reuse")}
        values = sampling_values(preset, seesr_model.defaults, {**values, "start_timestep": start_timestep})
        log_other_defaults(seesr_model, {_OWN_NAMES.get(name, name): value for name, value in values.items()})
        color_fix = values.pop("color_fix")
        choices = Choices(
            **values,
            scale=scale_for(image, scale, to),
            seed=seed,
            prompt=prompt,
            added_prompt=added_prompt,
            negative_prompt=negative_prompt,
            tiles=TileSettings.from_pixels(tile_size, overlap),
            tags=tags,
            exclude=exclude,
            threshold=threshold,
            strength=strength,
            rca_strength=rca_strength,
            local_prompts=local_prompts,
            fidelity=fidelity,
        )
        made = _decoded(parts, choices)
        finished = finish_images(made.pictures, made.prepared, image, scale=choices.scale, color_fix=color_fix)
        return io.NodeOutput(cut_images(finished, to), made.tags)


def _decoded(parts: Parts, choices: Choices) -> Decoded:
    """The last run again if nothing has changed since, or a new one."""
    if _last and _last[0].choices == choices and _same(_last[0].parts, parts.references()):
        return _last[0]
    _last.clear()
    with story() as passing:
        made = _make(parts, choices, passing)
    _last.append(made)
    return made


def _same(before: list[weakref.ref[Any]], now: list[weakref.ref[Any]]) -> bool:
    return all(a() is not None and a() is b() for a, b in zip(before, now, strict=True))


def _make(parts: Parts, choices: Choices, passing: Callable[[str], None]) -> Decoded:
    """Every step up to the decoded picture; `passing` is told each."""
    image, sampler = parts.image, comfy.samplers.sampler_object(choices.solver)
    prepared = prepare_levels(image, scale=choices.scale, min_size=MIN_SIZE)
    tell_on_node(_forecast(parts, choices))
    passing("1 of 4: reading the tags")
    tags = _tags(parts, choices)
    tell_on_node("\n".join(f"tags: {line or 'none'}" for line in tags))
    prompts, soft_prompt = _prompts(parts, choices, tags, prepared)
    model, positive, negative = apply_seesr(
        parts.model,
        prompts,
        [encode_text(parts.clip, choices.negative_prompt)],
        parts.seesr_model,
        soft_prompt,
        prepared,
        strength=choices.strength,
        rca_strength=choices.rca_strength,
        control_reuse=choices.control_reuse,
    )
    start = {"start_timestep": choices.start_timestep}
    sigmas = schedule_sigmas(model, steps=choices.steps, spacing=choices.spacing, **start)
    passing("2 of 4: encoding the photo")
    noise, latent = latent_init(model, parts.vae, prepared, sigmas, seed=choices.seed, **start)
    passing("3 of 4: sampling")
    model = attach_fidelity(model, latent, fidelity=choices.fidelity, decay=DECAY)
    model = attach_guidance_interval(model, choices.cfg_start, choices.cfg_end)
    tiled = tile_model(model, choices.tiles)
    sampled, _ = sample(tiled, positive, negative, noise, sampler, sigmas, latent, cfg=choices.cfg)
    passing("4 of 4: decoding")
    pictures = to_levels(decode_latent(parts.vae, sampled["samples"]), "the decoded picture").movedim(1, -1)
    tell_on_node("done")
    return Decoded(parts=parts.references(), choices=choices, tags=tags, prepared=prepared, pictures=pictures)


def _tags(parts: Parts, choices: Choices) -> list[str]:
    """The line of tags of each photo: what was given, or what the tagger reads."""
    if choices.tags.strip():
        return [choices.tags.strip()] * len(parts.image)
    return extract_tags(parts.dape, parts.image, threshold=choices.threshold, exclude=choices.exclude)


def _prompts(parts: Parts, choices: Choices, tags: list[str], prepared: Tensor) -> tuple[list[Any], Any]:
    """Positive conditionings and soft prompt: of whole photos, or of their tiles."""
    words = (choices.prompt, choices.added_prompt)
    if choices.local_prompts == OFF:
        texts = [encode_text(parts.clip, compose_text(line, *words)) for line in tags]
        return texts, parts.dape.read(parts.image).tokens_BLD
    use = _LOCAL[choices.local_prompts]
    read = read_tiles(
        parts.dape,
        parts.clip,
        parts.image,
        prepared,
        choices.tiles,
        use=use,
        words=words,
        threshold=choices.threshold,
        exclude=choices.exclude,
    )
    return [read.positive], read.soft_prompt


def _forecast(parts: Parts, choices: Choices) -> str:
    height, width = parts.image.shape[1:3]
    cells = 8 * choices.tiles.tile, 8 * choices.tiles.overlap
    known = {name: getattr(choices, name) for name in SAMPLING if name not in ("solver", "color_fix")}
    settings = UpscaleSettings(scale=choices.scale, tile=cells[0], overlap=cells[1], min_size=MIN_SIZE, **known)
    return forecast(parts.seesr_model, (width, height), settings)


def log_other_defaults(seesr_model: SeeSRModel, chosen: Mapping[str, Any]) -> None:
    """Tell in the log which of the `chosen` values are not those that the model was tuned for."""
    tuned = {_OWN_NAMES.get(name, name): value for name, value in seesr_model.defaults.items()}
    other = {name: value for name, value in tuned.items() if name in chosen and chosen[name] != value}
    if other:
        log.info(
            "%s was tuned for %s; the node runs %s",
            seesr_model.name,
            ", ".join(f"{name} {value}" for name, value in other.items()),
            ", ".join(f"{name} {chosen[name]}" for name in other),
        )


def sampler_names() -> list[str]:
    """The host's samplers, the published one first."""
    return ["ddpm", *(name for name in comfy.samplers.SAMPLER_NAMES if name != "ddpm")]


def _connections() -> list[Any]:
    return [
        io.Image.Input("image", tooltip="One or more photos of one size, at their own, low resolution."),
        io.Model.Input("model", tooltip="Stable Diffusion 2-base, SD-turbo or the embedded small model (seesr-nano)."),
        io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
        io.Vae.Input("vae", tooltip="The autoencoder of the same checkpoint."),
        DAPEType.Input("dape", tooltip="The tagger, from SeeSR Load DAPE."),
        ModelType.Input("seesr_model", tooltip="ControlNet and RCA, from SeeSR Load Model."),
        scale_input(),
    ]


def _sampling() -> list[Any]:
    return [
        steps_input(),
        cfg_input("How strongly the prompt guides. At 1 the negative prompt is left out and a step costs half."),
        seed_input(),
        words_input(),
        folded(added_prompt_input()),
        folded(
            io.String.Input("negative_prompt", default=_PUBLISHED.negative, tooltip="What guidance leads away from.")
        ),
        folded(
            io.Combo.Input(
                "sampler_name",
                options=sampler_names(),
                default="ddpm",
                tooltip="The sampler; ddpm is the published one.",
            )
        ),
        folded(
            start_timestep_input(
                "Noise level that the upscaled photo starts from; a lower one keeps more of the photo and takes "
                "fewer steps."
            )
        ),
    ]


def _finishing() -> list[Any]:
    return [
        folded(
            tile_size_input("Side of a denoised tile in pixels of the result; a larger picture is sampled in tiles.")
        ),
        folded(overlap_input("Pixels that neighbouring tiles share.")),
        color_fix_input(),
        io.Combo.Input(
            "local_prompts",
            options=[OFF, *_LOCAL],
            default=OFF,
            optional=True,
            tooltip="What every tile of a large result reads in its own part of the photo, beside what the whole photo "
            "shows.",
        ),
        fidelity_input(optional=True),
    ]


def _later() -> list[Any]:
    """Inputs that came later, which saved graphs may lack."""
    return [
        preset_input("steps, cfg, sampler_name, start_timestep and color_fix"),
        to_input(),
        io.String.Input(
            "tags",
            default="",
            optional=True,
            tooltip="Tags to use instead of those that are read, separated by commas; the node shows what was used.",
        ),
        folded(exclude_input(optional=True)),
        folded(threshold_input(optional=True)),
        folded(_share("strength", "How much the ControlNet steers towards the photo; 0 leaves it out.")),
        folded(_share("rca_strength", "How much both networks heed the soft prompt; 0: not at all.")),
    ]


def _share(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=0.0, max=10.0, step=0.01, optional=True, tooltip=tooltip)
