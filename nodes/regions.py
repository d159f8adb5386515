"""Tags that know their place: where the tagger sees them, and prompts whose words act only there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..seesr_core.dape import Tag
from ..seesr_core.dape.vocabulary import SEPARATOR, Language, split_words
from ..seesr_core.errors import SettingsError
from ..seesr_core.method.regions import check_masks, number_tokens, tag_spans
from ..seesr_core.pictures.overlay import draw_regions
from .host.photo_masks import of_photos
from .host.regions import KEY, RegionPrompt
from .host.report import warn_on_node
from .host.text import encode_text, token_counter
from .prompts import (
    added_prompt_input,
    compose_text,
    tagging_inputs,
    tags_output,
    warn_without_tags,
    words_input,
)
from .schema import channels_first, make_schema

if TYPE_CHECKING:
    from .host.dape import HostDAPE


class SeeSRGroundTags(io.ComfyNode):
    """The tags of a photo, and where they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRGroundTags",
            display_name="SeeSR Ground Tags",
            description="Names what the photo shows and says where: a mask for every tag, from the tagger itself, "
            "without a segmentation model. For SeeSR Region Prompt, SeeSR Spatial Guidance or any node that takes "
            "masks.",
            search_aliases=["grounding", "tag masks", "where is", "attention map", "segment tags", "seesr regions"],
            inputs=tagging_inputs(),
            outputs=[
                tags_output(),
                io.Mask.Output(
                    display_name="masks",
                    tooltip="One mask per tag in the tags' order, picture after picture; 1 where the tag is.",
                ),
                io.Image.Output(display_name="preview", tooltip="The photo with each tag's region coloured and named."),
            ],
        )

    @classmethod
    def execute(
        cls, dape: HostDAPE, image: Tensor, threshold: float, exclude: str, language: Language
    ) -> io.NodeOutput:
        """Tags, masks and preview of every picture."""
        reading = dape.read(image)
        chosen = dape.vocabulary.select(
            reading.logits_BN, threshold=threshold, exclude=split_words(exclude), language=language
        )
        lines = [SEPARATOR.join(tag.name for tag in tags) for tags in chosen]
        warn_without_tags(lines, "SeeSR Ground Tags")
        masks = [dape.ground(picture[None], tags) for picture, tags in zip(image, chosen, strict=True)]
        previews = [preview(dape, *parts) for parts in zip(image, masks, chosen, strict=True)]
        batch = of_photos(some_mask(torch.cat(masks)), [len(mask) for mask in masks])
        return io.NodeOutput(lines, batch, torch.stack(previews))


def some_mask(masks_NHW: Tensor) -> Tensor:
    """The masks; without any a single one of ones, since the host's nodes take no empty batch."""
    return masks_NHW if len(masks_NHW) else torch.ones(1, *masks_NHW.shape[1:])


def preview(dape: HostDAPE, image_HWC: Tensor, masks_NHW: Tensor, tags: list[Tag]) -> Tensor:
    """The photo (H', W', 3) with its tags where they are, in English, which Pillow's font can write."""
    names = [dape.vocabulary.tags[tag.index] for tag in tags]
    return as_image(draw_regions(as_picture(image_HWC), masks_NHW, names))


def as_picture(image_HWC: Tensor) -> Image.Image:
    """The host's picture in 8 bits."""
    levels = channels_first(image_HWC[None])[0].movedim(0, -1)
    return Image.fromarray((levels * 255.0).round().to(torch.uint8).cpu().numpy())


def as_image(picture: Image.Image) -> Tensor:
    """A picture as the host has them, (H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).float() / 255.0


class SeeSRRegionPrompt(io.ComfyNode):
    """A prompt whose tags act where their masks are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRRegionPrompt",
            display_name="SeeSR Region Prompt",
            description="Encodes a prompt whose tags act only where their masks are; all other words act everywhere. "
            "SeeSR Apply puts it into the model; one run of the networks per step as before, however many masks. Masks "
            "come from SeeSR Ground Tags, a segmentation node or the mask editor.",
            search_aliases=["regional prompt", "masked prompt", "attention mask", "prompt per region", "couple"],
            is_input_list=True,
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
                io.String.Input(
                    "tags", force_input=True, tooltip="Tags separated by commas, such as those of SeeSR Ground Tags."
                ),
                io.Mask.Input(
                    "masks", tooltip="One mask per tag in the tags' order. Tags without a mask act everywhere."
                ),
                words_input(),
                added_prompt_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strictly words keep to their masks; 0 is the plain prompt.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", is_output_list=True, tooltip="For SeeSR Apply, one per text of tags."
                )
            ],
        )

    @classmethod
    def execute(cls, **inputs: list[Any]) -> io.NodeOutput:
        """Every input arrives as a list; tags have one text per photo, masks follow each other photo by photo."""
        clip, prompt, added, strength = (inputs[name][0] for name in ("clip", "prompt", "added_prompt", "strength"))
        lines = inputs["tags"]
        groups = share_masks([check_masks(mask) for mask in inputs["masks"]], lines)
        return io.NodeOutput(
            [
                region_prompt(clip, line, masks, prompt=prompt, added_prompt=added, strength=strength)
                for line, masks in zip(lines, groups, strict=True)
            ]
        )


def share_masks(masks: list[Tensor], lines: list[str]) -> list[Tensor]:
    """For each text the masks of its tags: given so, or all in one batch, text after text.

    Raises:
        SettingsError: masks of several sizes in one batch, or another number than there are tags.
    """
    if len(lines) > 1 and len(masks) == len(lines):
        return masks
    if len(masks) > 1:
        raise SettingsError(
            f"SeeSR Region Prompt got {len(masks)} lists of masks for {len(lines)} texts of tags; connect one batch of "
            "masks, one for each tag (Mask Batch joins single ones)."
        )
    counts = [len(tag_spans(line)) for line in lines]
    if len(lines) > 1 and len(masks[0]) == sum(counts):
        return list(masks[0].split(counts))
    return [masks[0]] * len(lines)


def region_prompt(clip: Any, tags: str, masks_NHW: Tensor, *, prompt: str, added_prompt: str, strength: float) -> Any:
    """CONDITIONING of a prompt whose tags act where `masks_NHW` are.

    Raises:
        SettingsError: more masks than tags.
    """
    text, spans = compose_text(tags, prompt, added_prompt), tag_spans(tags)
    if len(masks_NHW) > len(spans) and not _says_nothing(masks_NHW):
        raise SettingsError(
            f"SeeSR Region Prompt got {len(masks_NHW)} masks for {len(spans)} tags ('{tags}'); expected one for each "
            "tag, in the tags' order."
        )
    if len(masks_NHW) < len(spans):
        warn_on_node(
            f"SeeSR Region Prompt got {len(masks_NHW)} masks for {len(spans)} tags; the last "
            f"{len(spans) - len(masks_NHW)} act everywhere."
        )
    conditioning = encode_text(clip, text)
    count_tokens = token_counter(clip)
    numbers, places = number_tokens(text, spans[: len(masks_NHW)], count_tokens), count_tokens.places(text)
    tokens: list[list[Any]] = []
    for states, extras in conditioning:
        full = torch.zeros(states.shape[1], dtype=torch.int64)
        for place, number in zip(places, numbers, strict=True):
            if place < len(full):
                full[place] = number
        region = RegionPrompt(masks=masks_NHW, numbers=full, strength=strength)
        tokens.append([states, {**extras, KEY: (region,)} if region.acts else extras])
    return tokens


def _says_nothing(masks_NHW: Tensor) -> bool:
    """A single mask of ones is what SeeSR Ground Tags gives for a photo without tags."""
    return len(masks_NHW) == 1 and bool((masks_NHW == 1).all())
