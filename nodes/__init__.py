"""ComfyUI's side of SeeSR: schemas, layout, host classes. The method itself lies in `seesr_core`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders
from .apply import SeeSRApply
from .image import SeeSRFinishImage, SeeSRPrepareImage
from .latent import SeeSRLatentInit, SeeSRScheduler
from .loaders import SeeSRLoadDAPE, SeeSRLoadModel
from .local import SeeSRTilePrompts
from .prompts import SeeSRExtractTags, SeeSRPrompt, SeeSRSoftPrompt
from .regions import SeeSRGroundTags, SeeSRRegionPrompt
from .segsr import SegSRApply, SegSRLoadModel, SegSRSegmentation
from .steering import SeeSRFidelity, SeeSRSpatialGuidance
from .tiled import SeeSRTiledSampler, SeeSRTileModel
from .upscale import SeeSRUpscale

NODES: list[type[io.ComfyNode]] = [
    SeeSRLoadDAPE,
    SeeSRLoadModel,
    SeeSRPrepareImage,
    SeeSRExtractTags,
    SeeSRPrompt,
    SeeSRSoftPrompt,
    SeeSRApply,
    SeeSRLatentInit,
    SeeSRScheduler,
    SeeSRTiledSampler,
    SeeSRTileModel,
    SeeSRFinishImage,
    SeeSRUpscale,
    SeeSRGroundTags,
    SeeSRRegionPrompt,
    SeeSRTilePrompts,
    SeeSRSpatialGuidance,
    SeeSRFidelity,
    SegSRLoadModel,
    SegSRApply,
    SegSRSegmentation,
]

folders.register()


class SeeSRExtension(ComfyExtension):
    """All nodes of the plugin."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes in the order of a graph."""
        return NODES
