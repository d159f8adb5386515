"""The whole method in one node: the functions of the small nodes, in their order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.method.color import ColorFix
from ..seesr_core.method.guidance import DECAY
from ..seesr_core.settings import UpscaleSettings
from .apply import apply_seesr
from .host.sampler import sample
from .host.steering import attach_fidelity
from .host.text import encode_text
from .host.tiling.tiles import TileSettings, tile_model
from .host.vae import decode_latent
from .image import color_fix_input, finish_images, prepare_levels, scale_input
from .latent import latent_init, schedule_sigmas, seed_input, start_timestep_input, steps_input
from .local import USES, read_tiles
from .prompts import added_prompt_input, compose_text, extract_tags
from .schema import DAPEType, ModelType, make_schema
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
            search_aliases=["seesr", "upscale", "super resolution", "enhance photo", "restore", "image upscaler"],
            inputs=[*_connections(), *_sampling(), *_finishing()],
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
    ) -> io.NodeOutput:
        """The finished pictures and their tags."""
        tiles = TileSettings.from_pixels(tile_size, overlap)
        sampler = comfy.samplers.sampler_object(sampler_name)
        chosen = {"steps": steps, "cfg": cfg, "start_timestep": start_timestep, "sampler_name": sampler_name}
        log_other_defaults(seesr_model, {**chosen, "color_fix": color_fix})
        prepared = prepare_levels(image, scale=scale, min_size=MIN_SIZE)
        tags = extract_tags(dape, image)
        if local_prompts == OFF:
            prompts = [encode_text(clip, compose_text(line, prompt, added_prompt)) for line in tags]
            soft_prompt: Any = dape.read(image).tokens_BLD
        else:
            use, words = _LOCAL[local_prompts], (prompt, added_prompt)
            read = read_tiles(dape, clip, image, prepared, tiles, use=use, words=words)
            prompts, soft_prompt = [read.positive], read.soft_prompt
        negatives = [encode_text(clip, negative_prompt)]
        model, positive, negative = apply_seesr(model, prompts, negatives, seesr_model, soft_prompt, prepared)
        sigmas = schedule_sigmas(model, steps=steps, start_timestep=start_timestep)
        noise, latent = latent_init(model, vae, prepared, sigmas, seed=seed, start_timestep=start_timestep)
        model = attach_fidelity(model, latent, fidelity=fidelity, decay=DECAY)
        sampled, _ = sample(tile_model(model, tiles), positive, negative, noise, sampler, sigmas, latent, cfg=cfg)
        decoded = decode_latent(vae, sampled["samples"])
        return io.NodeOutput(finish_images(decoded, prepared, image, scale=scale, color_fix=color_fix), tags)


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
        io.String.Input("prompt", default="", multiline=True, tooltip="Your own words, after the tags."),
        added_prompt_input(),
        io.String.Input(
            "negative_prompt",
            default=_PUBLISHED.negative,
            multiline=True,
            tooltip="What guidance leads away from.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=sampler_names(),
            default="ddpm",
            tooltip="The sampler; ddpm is the published one.",
        ),
        start_timestep_input(
            "Noise level that the upscaled photo starts from; a lower one keeps more of the photo and takes "
            "fewer steps."
        ),
    ]


def _finishing() -> list[Any]:
    return [
        tile_size_input("Side of a denoised tile in pixels of the result; a larger picture is sampled in tiles."),
        overlap_input("Pixels that neighbouring tiles share."),
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
