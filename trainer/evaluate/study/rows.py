"""The rows of the ablation: each a small change of what the pipeline is given, never another pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from PIL import Image, ImageFilter
from torch import Tensor

from seesr_core.method.schedule import LAST_TIMESTEP
from seesr_core.pictures.sizes import Size, prepare_size, resize
from seesr_core.pipeline import Prompts, SeeSRPipeline
from seesr_core.settings import UpscaleSettings

from ..pictures import as_picture

FULL = "full"
PLAIN_TAGGER = "plain_tagger"
SHARPEN_RADIUS, SHARPEN_PERCENT = 2.0, 150


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What one photo is upscaled from."""

    settings: UpscaleSettings
    """Settings of the run."""
    prompts: Prompts
    """What DAPE reads in this photo."""
    others: Prompts
    """What DAPE reads in another photo of the set."""
    start: Image.Image
    """Photo whose latent sampling starts from."""
    control: Image.Image
    """Photo that ControlNet sees."""
    other: Image.Image
    """Another photo of the set, in the size of this one."""
    plain: Prompts | None
    """What the un-tuned tagger reads in this photo; None if there is none."""


Change = Callable[[Inputs], Inputs]


def _same(inputs: Inputs) -> Inputs:
    return inputs


def _no_tags(inputs: Inputs) -> Inputs:
    return replace(inputs, prompts=replace(inputs.prompts, tags=[[] for _ in inputs.prompts.tags]))


def _shuffled_tags(inputs: Inputs) -> Inputs:
    return replace(inputs, prompts=replace(inputs.prompts, tags=inputs.others.tags))


def _no_soft_prompt(inputs: Inputs) -> Inputs:
    return replace(inputs, prompts=replace(inputs.prompts, soft_prompt=None))


def _shuffled_soft_prompt(inputs: Inputs) -> Inputs:
    return replace(inputs, prompts=replace(inputs.prompts, soft_prompt=inputs.others.soft_prompt))


def _plain_tagger(inputs: Inputs) -> Inputs:
    if inputs.plain is None:
        raise ValueError("this row needs what the un-tuned tagger reads")
    return replace(inputs, prompts=inputs.plain)


def _from_noise(inputs: Inputs) -> Inputs:
    return replace(inputs, settings=replace(inputs.settings, start="noise", start_timestep=LAST_TIMESTEP))


def _shuffled_latent(inputs: Inputs) -> Inputs:
    return replace(inputs, start=inputs.other)


def _shuffled_control(inputs: Inputs) -> Inputs:
    return replace(inputs, control=inputs.other)


def _with(**changes: Any) -> Change:
    """The same inputs under other settings."""
    return lambda inputs: replace(inputs, settings=replace(inputs.settings, **changes))


_TILED: Mapping[str, Any] = {"tile": 256, "overlap": 32}
"""Tiles so small that the usual pairs have several."""

PLACED: Mapping[str, Change] = {
    "regions": _with(region_strength=1.0),
    "spatial_guidance": _with(spatial_cfg="auto"),
    "tiles": _with(**_TILED),
    "tiles_local_prompts": _with(**_TILED, local_prompts="both"),
    "fidelity_25": _with(fidelity=0.25),
    "fidelity_50": _with(fidelity=0.5),
    "fidelity_75": _with(fidelity=0.75),
}
"""Rows with semantics in their places, or nearer to the photo; `tiles` is what `tiles_local_prompts` compares with."""

ROWS: Mapping[str, Change] = {
    FULL: _same,
    "no_tags": _no_tags,
    "shuffled_tags": _shuffled_tags,
    "no_soft_prompt": _no_soft_prompt,
    "shuffled_soft_prompt": _shuffled_soft_prompt,
    PLAIN_TAGGER: _plain_tagger,
    "start_from_noise": _from_noise,
    "shuffled_latent": _shuffled_latent,
    "shuffled_control": _shuffled_control,
    **PLACED,
}
"""Rows that sample. A new one is a line here, if `Inputs` has what it changes."""

WITHOUT_LOSS = ("start_from_noise", "shuffled_latent", *PLACED)
"""Rows without a denoising loss of their own: they change the sampling around the networks, not their inputs."""


def bicubic(photo: Image.Image, size: Size) -> Image.Image:
    """PIL's bicubic on 8 bits."""
    return resize(photo, size)


def bicubic_sharpened(photo: Image.Image, size: Size) -> Image.Image:
    """Bicubic, then an unsharp mask (radius 2 px, 150 %): sharpness without any knowledge."""
    return bicubic(photo, size).filter(ImageFilter.UnsharpMask(SHARPEN_RADIUS, SHARPEN_PERCENT, 0))


FILTERS: Mapping[str, Callable[[Image.Image, Size], Image.Image]] = {
    "bicubic": bicubic,
    "bicubic_sharpened": bicubic_sharpened,
}
"""Rows without networks."""


def sampled(pipeline: SeeSRPipeline, inputs: Inputs) -> Tensor:
    """The latent (1, C, h, w) that sampling from these inputs ends at, by the pipeline's own steps."""
    settings = inputs.settings
    texts = pipeline.compose(inputs.prompts, settings)
    states = pipeline.encode_text([settings.negative, *texts])
    needs_latent = settings.start == "lr" or settings.fidelity > 0
    z_lr = pipeline.encode(pipeline.prepare([inputs.start], settings), settings) if needs_latent else None
    control = pipeline.prepare([inputs.control], settings)
    semantics = pipeline.place([inputs.control], inputs.prompts, texts, control, settings)
    return pipeline.sample(control, z_lr, states, inputs.prompts.soft_prompt, settings, semantics)


def finished(pipeline: SeeSRPipeline, photo: Image.Image, latent: Tensor, settings: UpscaleSettings) -> Image.Image:
    """The picture of a latent, with the photo's colours and its size × scale."""
    sizes = prepare_size(*photo.size, scale=settings.scale, min_size=settings.min_size)
    decoded = pipeline.decode(latent, settings)
    return pipeline.finish(decoded, pipeline.prepare([photo], settings), sizes, settings)[0]


def without_diffusion(pipeline: SeeSRPipeline, pair: Pair, settings: UpscaleSettings) -> Image.Image:
    """The enlarged LR photo through the autoencoder and the finish: what is left if nothing is sampled."""
    latent = pipeline.encode(pipeline.prepare([pair.photo()], settings), settings)
    return finished(pipeline, pair.photo(), latent, settings)


def autoencoder(pipeline: SeeSRPipeline, pair: Pair, settings: UpscaleSettings) -> Image.Image:
    """HR through the autoencoder: as near as any result can come."""
    return as_picture(pipeline.decode(pipeline.encode(pair.original()[None], settings), settings)[0])


class Pair(Protocol):
    """LR and HR of one picture."""

    def photo(self) -> Image.Image:
        """The photo to upscale (LR)."""
        ...

    def original(self) -> Tensor:
        """The original (HR), uint8 (3, H, W)."""
        ...


CODED: Mapping[str, Callable[[SeeSRPipeline, Pair, UpscaleSettings], Image.Image]] = {
    "without_diffusion": without_diffusion,
    "autoencoder": autoencoder,
}
"""Rows that run the autoencoder alone."""
