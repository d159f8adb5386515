"""The rows of the ablation: each a small change of what the pipeline is given, never another pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from PIL import Image, ImageFilter

from seesr_core.method.schedule import LAST_TIMESTEP
from seesr_core.pictures.sizes import Size, resize
from seesr_core.pipeline import Prompts, SeeSRPipeline
from seesr_core.settings import UpscaleSettings

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


ROWS: Mapping[str, Change] = {
    FULL: _same,
    "no_tags": _no_tags,
    "shuffled_tags": _shuffled_tags,
    "no_soft_prompt": _no_soft_prompt,
    "shuffled_soft_prompt": _shuffled_soft_prompt,
    PLAIN_TAGGER: _plain_tagger,
    "start_from_noise": _from_noise,
}
"""Rows that run the networks."""

WITHOUT_LOSS = ("start_from_noise",)
"""Rows whose denoising loss is that of `full`: they only change where sampling starts."""


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


def upscale(pipeline: SeeSRPipeline, photo: Image.Image, inputs: Inputs) -> Image.Image:
    """The photo upscaled from these inputs."""
    return pipeline.run([photo], inputs.settings, prompts=inputs.prompts)[0].image
