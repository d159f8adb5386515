"""Nodes that read SeeSR's own weights: the tagger, and the trained part (ControlNet and RCA)."""

from __future__ import annotations

from comfy_api.latest import io

from . import folders
from .schema import DAPEType, ModelType, make_schema


class SeeSRLoadDAPE(io.ComfyNode):
    """The tagger."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRLoadDAPE",
            display_name="SeeSR Load DAPE",
            description="Loads the tagger that names what a degraded photo shows (DAPE). Files lie in models/dape; a "
            "small one comes with the plugin.",
            search_aliases=["seesr dape", "load tagger", "ram", "recognize anything", "image tagging model"],
            inputs=[
                io.Combo.Input(
                    "dape_name",
                    options=folders.dape_names(),
                    tooltip="A file in models/dape. It must be the one that the SeeSR model was trained with.",
                )
            ],
            outputs=[DAPEType.Output(display_name="dape", tooltip="For SeeSR Extract Tags and SeeSR Soft Prompt.")],
        )

    @classmethod
    def execute(cls, dape_name: str) -> io.NodeOutput:
        """The tagger behind the host's memory management."""
        from .host.dape import load_dape

        return io.NodeOutput(load_dape(folders.dape_path(dape_name)))


class SeeSRLoadModel(io.ComfyNode):
    """ControlNet and RCA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRLoadModel",
            display_name="SeeSR Load Model",
            description="Loads SeeSR's trained part: the ControlNet and the cross-attention to the soft prompt (RCA). "
            "Files lie in models/seesr; the published folders “unet” and “controlnet” work there inside one folder.",
            search_aliases=["seesr model", "load seesr", "super resolution controlnet", "upscale model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.control_names(),
                    tooltip="A file or published folder in models/seesr. It must fit the base model.",
                )
            ],
            outputs=[ModelType.Output(display_name="seesr_model", tooltip="For SeeSR Apply.")],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        """Both networks behind the host's memory management."""
        from .host.seesr_model import load_seesr_model

        return io.NodeOutput(load_seesr_model(folders.control_path(model_name)))
