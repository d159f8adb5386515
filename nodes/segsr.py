"""Nodes of SegSR, a reconstruction: a segmentation is denoised beside the picture, and each tells the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.segsr.labels import enlarge_labels, paint
from ..seesr_core.tiling.grid import PIXELS_PER_CELL
from . import folders
from .host import checks
from .host.local import TileSoftPrompt, split_soft_prompts
from .schema import DAPEType, SegSRType, SoftPromptType, make_schema, unit_range, view_channels_first

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .host.conds import Conditioning
    from .host.dape import HostDAPE
    from .host.segsr import SegSRModel


class SegSRLoadModel(io.ComfyNode):
    """SegDM and bridge."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SegSRLoadModel",
            display_name="SegSR Load Model",
            description="Loads SegSR's trained part, a reconstruction: the network that denoises a segmentation and "
            "the bridge between it and SeeSR. Files lie in models/segsr; a toy of the method comes with the plugin.",
            search_aliases=["segsr", "segmentation super resolution", "segdm", "dual diffusion", "load segsr"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.segsr_names(),
                    tooltip="A file in models/segsr. It must fit the SeeSR model and the DAPE.",
                )
            ],
            outputs=[SegSRType.Output(display_name="segsr_model", tooltip="For SegSR Apply.")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        """The networks behind the host's memory management."""
        from .host.segsr import load_segsr_model

        return io.NodeOutput(load_segsr_model(folders.segsr_path(model_name)))


class SegSRApply(io.ComfyNode):
    """A segmentation beside the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SegSRApply",
            display_name="SegSR Apply",
            description="Lets the sampler denoise a segmentation beside the picture: after every step each tells the "
            "other what it has found. A reconstruction of SegSR. Goes between SeeSR Apply and the sampler.",
            search_aliases=["segsr apply", "segmentation prior", "semantic super resolution", "dual modality bridge"],
            inputs=[
                io.Model.Input("model", tooltip="From SeeSR Apply."),
                io.Conditioning.Input("positive", tooltip="From SeeSR Apply."),
                io.Conditioning.Input("negative", tooltip="From SeeSR Apply."),
                SegSRType.Input("segsr_model", tooltip="From SegSR Load Model."),
                io.Image.Input("image", tooltip="The upscaled photo, from SeeSR Prepare Image."),
                DAPEType.Input("dape", tooltip="The tagger that the soft prompt is from."),
                SoftPromptType.Input("soft_prompt", tooltip="From SeeSR Soft Prompt, of the same photos."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much the picture is told of the segmentation; 0 leaves the picture as it is without.",
                ),
                io.MultiType.Input(
                    "segmentation",
                    types=[io.Image, io.Mask],
                    optional=True,
                    tooltip="A segmentation to start from: a picture in the model's colours, black where nothing is "
                    "known, or one mask per class in the order of the list.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For the sampler."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        negative: Conditioning,
        segsr_model: SegSRModel,
        image: Tensor,
        dape: HostDAPE,
        soft_prompt: Tensor | TileSoftPrompt,
        strength: float,
        segmentation: Tensor | None = None,
    ) -> io.NodeOutput:
        """A patched clone of the model, and conditionings whose ControlNet listens."""
        from .host.segsr import SegSRPatch, attach_segsr, check_tokens, read_segmentation, tell_control

        hint = view_channels_first(image)
        checks.check_image(hint)
        (tokens,), _ = split_soft_prompts([soft_prompt])
        check_tokens(tokens, dape, segsr_model, len(hint))
        labels = read_segmentation(segmentation, segsr_model.classes, hint.shape[-2:])
        patch = SegSRPatch(segsr=segsr_model, tokens_BLD=tokens, strength=strength, labels_BHW=labels)
        return io.NodeOutput(attach_segsr(model, patch), *tell_control([positive, negative], segsr_model, strength))


class SegSRSegmentation(io.ComfyNode):
    """What the sampler found beside the picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SegSRSegmentation",
            display_name="SegSR Segmentation",
            description="The segmentation that was denoised beside the picture: in colours, as one mask per class that "
            "is there, and their names.",
            search_aliases=["segsr labels", "segmentation map", "class masks", "semantic labels"],
            inputs=[io.Latent.Input("latent", tooltip="The latent output of the sampler.")],
            outputs=[
                io.Image.Output(display_name="labels", tooltip="Each class in its colour."),
                io.Mask.Output(
                    display_name="masks", tooltip="One mask per class that is there, picture after picture."
                ),
                io.String.Output(
                    display_name="names",
                    is_output_list=True,
                    tooltip="The classes' names in the masks' order, separated by commas, one text per picture.",
                ),
            ],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any]) -> io.NodeOutput:
        """Labels of every picture of a batch."""
        from .host.segsr import labels_of

        found = labels_of(latent)
        sides = tuple(PIXELS_PER_CELL * side for side in found.labels.shape[1:])
        labels = enlarge_labels(found.labels, *sides)
        present = [picture.unique() for picture in labels]
        masks = [(picture == label).float() for picture, own in zip(labels, present, strict=True) for label in own]
        names = [", ".join(found.classes.names[int(label)] for label in own) for own in present]
        colours = unit_range(paint(labels, list(found.classes.palette)).movedim(1, -1))
        return io.NodeOutput(colours, torch.stack(masks), names)
