"""Both prompts of a photo: tags as text, the soft prompt as tokens; and the text that the tags become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.dape.vocabulary import Language, split_words
from ..seesr_core.method.text import compose_prompt
from ..seesr_core.settings import UpscaleSettings
from .host.report import warn_on_node
from .schema import DAPEType, SoftPromptType, make_schema

if TYPE_CHECKING:
    from .host.dape import HostDAPE

_PUBLISHED = UpscaleSettings()


class SeeSRExtractTags(io.ComfyNode):
    """The hard prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRExtractTags",
            display_name="SeeSR Extract Tags",
            description="Names what the photo shows, even where it is blurred or noisy. One line of tags per picture "
            "of the batch; nodes after it run once per line.",
            search_aliases=["seesr tags", "image tagging", "interrogate", "ram tagger", "caption", "dape"],
            inputs=tagging_inputs(),
            outputs=[tags_output()],
        )

    @classmethod
    def execute(
        cls, dape: HostDAPE, image: Tensor, threshold: float, exclude: str, language: Language
    ) -> io.NodeOutput:
        """The tags of every picture."""
        return io.NodeOutput(extract_tags(dape, image, threshold=threshold, exclude=exclude, language=language))


class SeeSRPrompt(io.ComfyNode):
    """Tags and words as one text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRPrompt",
            display_name="SeeSR Prompt",
            description="Joins the tags, your own words and the words that always follow, in the order that SeeSR was "
            "published with. Connect it to CLIP Text Encode.",
            search_aliases=["seesr prompt", "compose prompt", "join tags", "positive prompt"],
            inputs=[
                io.String.Input("tags", force_input=True, tooltip="From SeeSR Extract Tags, or any other text."),
                words_input(),
                added_prompt_input(),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The positive prompt.")],
        )

    @classmethod
    def execute(cls, tags: str, prompt: str, added_prompt: str) -> io.NodeOutput:
        """The text."""
        return io.NodeOutput(compose_text(tags, prompt, added_prompt))


class SeeSRSoftPrompt(io.ComfyNode):
    """The soft prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRSoftPrompt",
            display_name="SeeSR Soft Prompt",
            description="What the tagger sees in the photo, as tokens that U-Net and ControlNet attend to. It costs "
            "nothing beside SeeSR Extract Tags on the same photo: the tagger looks once.",
            search_aliases=["seesr soft prompt", "image embedding", "representation tokens", "dape"],
            inputs=[
                DAPEType.Input("dape", tooltip="The tagger, from SeeSR Load DAPE."),
                photo_input(),
            ],
            outputs=[SoftPromptType.Output(display_name="soft_prompt", tooltip="For SeeSR Apply.")],
        )

    @classmethod
    def execute(cls, dape: HostDAPE, image: Tensor) -> io.NodeOutput:
        """The tokens of every picture."""
        return io.NodeOutput(dape.read(image).tokens_BLD)


def tagging_inputs() -> list[io.Input]:
    """A tagger, a photo, and which of its tags are wanted in what language."""
    return [
        DAPEType.Input("dape", tooltip="The tagger, from SeeSR Load DAPE."),
        photo_input(),
        threshold_input(),
        exclude_input(),
        io.Combo.Input(
            "language",
            options=["en", "zh"],
            default="en",
            tooltip="Language of the tags. Stable Diffusion reads English.",
        ),
    ]


def photo_input() -> io.Image.Input:
    """What the tagger looks at."""
    return io.Image.Input("image", tooltip="The photo at its own, low resolution, not the upscaled one.")


def threshold_input(*, optional: bool = False) -> io.Float.Input:
    """How sure the tagger must be."""
    return io.Float.Input(
        "threshold",
        default=1.0,
        min=0.0,
        max=10.0,
        step=0.01,
        optional=optional,
        tooltip="Factor on every tag's own threshold: below 1 finds more tags, above 1 fewer.",
    )


def exclude_input(*, optional: bool = False) -> io.String.Input:
    """Tags that are not wanted."""
    return io.String.Input(
        "exclude",
        default="",
        optional=optional,
        tooltip="Tags never to use, separated by commas, in English or Chinese.",
    )


def tags_output() -> io.String.Output:
    """The tags of each picture."""
    return io.String.Output(
        display_name="tags", is_output_list=True, tooltip="Tags separated by commas, one text per picture."
    )


def words_input() -> io.String.Input:
    """The user's own words."""
    return io.String.Input("prompt", default="", multiline=True, tooltip="Your own words, after the tags.")


def added_prompt_input() -> io.String.Input:
    """The words that always follow."""
    return io.String.Input(
        "added_prompt",
        default=_PUBLISHED.added_prompt,
        tooltip="Words that always follow: what a good photo is.",
    )


def extract_tags(
    dape: HostDAPE, image_BHWC: Tensor, *, threshold: float = 1.0, exclude: str = "", language: Language = "en"
) -> list[str]:
    """The tags of every picture, joined by ", "; a picture in which none is found gives "" and a note on the node."""
    lines = dape.vocabulary.prompt_tags(
        dape.read(image_BHWC).logits_BN,
        threshold=threshold,
        exclude=split_words(exclude),
        language=language,
    )
    warn_without_tags(lines, "SeeSR Extract Tags")
    return lines


def warn_without_tags(lines: Sequence[str], node: str) -> None:
    """A note on the node if there is no tag in some picture."""
    if not all(lines):
        without = ", ".join(str(number) for number, line in enumerate(lines) if not line)
        warn_on_node(
            f"SeeSR: expected at least one tag for every picture, found none in picture {without}, whose prompt goes "
            f"without; lower the threshold of {node}, or write what the photo shows into the prompt."
        )


def compose_text(tags: str, prompt: str, added_prompt: str) -> str:
    """`"{tags}, {prompt},{added_prompt}"`, as published; without tags it begins with the words there are."""
    if tags.strip():
        return compose_prompt([tags], prompt, added_prompt)
    return ",".join(words for words in (prompt, added_prompt) if words.strip())
