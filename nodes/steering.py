"""Nodes that steer what any MODEL predicts: how faithful it stays to the photo, and where the prompt guides it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.method.guidance import DECAY
from .host.steering import attach_fidelity, attach_spatial_guidance
from .schema import make_schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def fidelity_input(**options: Any) -> io.Float.Input:
    """How near the result stays to the photo."""
    return io.Float.Input(
        "fidelity",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="How near the result stays to the photo: 0 leaves the model free, 1 begins with the photo itself.",
        **options,
    )


class SeeSRFidelity(io.ComfyNode):
    """The dial between the model's detail and the photo's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRFidelity",
            display_name="SeeSR Fidelity",
            description="Keeps the result nearer to the photo: at every step the estimate of the clean picture is "
            "pulled towards the upscaled photo, strongly at first, less and less later. For faces, text and thin "
            "lines. Works with any Stable Diffusion model and sampler.",
            search_aliases=["fidelity", "restoration guidance", "closer to photo", "faithful", "seesr fidelity"],
            inputs=[
                io.Model.Input("model", tooltip="The model, from SeeSR Apply or any other."),
                io.Latent.Input("latent", tooltip="The encoded photo, from SeeSR Latent Init."),
                fidelity_input(),
                io.Float.Input(
                    "decay",
                    default=DECAY,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How soon the pull lets go: larger lets go earlier, 0 holds it to the end.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model that stays nearer to the photo.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, latent: dict[str, Any], fidelity: float, decay: float) -> io.NodeOutput:
        """A patched clone of the model."""
        return io.NodeOutput(attach_fidelity(model, latent, fidelity=fidelity, decay=decay))


class SeeSRSpatialGuidance(io.ComfyNode):
    """Guidance where the prompt is about something."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRSpatialGuidance",
            display_name="SeeSR Spatial Guidance",
            description="Lets the prompt guide only where a mask says that it is about something; elsewhere the "
            "prediction without the prompt is used as it is. Costs nothing per step. Works with any Stable Diffusion "
            "model whose cfg is above 1.",
            search_aliases=["spatial cfg", "masked guidance", "regional cfg", "srsr", "seesr spatial guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The model, from SeeSR Apply or any other."),
                io.Mask.Input(
                    "mask",
                    tooltip="Where the prompt guides: masks of SeeSR Ground Tags (the largest counts), or any other.",
                ),
                io.Float.Input(
                    "outside",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the guidance outside the mask; 1 is guidance everywhere, as without this node.",
                ),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=1024,
                    tooltip="Width of the mask's soft edge in pixels of the result.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, guided where the mask is.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, mask: Tensor, outside: float, feather: int) -> io.NodeOutput:
        """A patched clone of the model."""
        return io.NodeOutput(attach_spatial_guidance(model, mask, outside=outside, feather=feather))
