"""Nodes for tests only, copied into a host's `custom_nodes`: MODELs that SeeSR does not fit, and a list of photos.

The models are the host's own, of the published sizes and as the host detects them, on the device "meta": no weights and
no memory.
"""

from __future__ import annotations

from typing import Any

import comfy.model_detection
import comfy.model_patcher
import torch

_ALL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "SD15": {**_ALL, "context_dim": 768, "use_linear_in_transformer": False},
    "SD2 inpainting": {**_ALL, "context_dim": 1024, "in_channels": 9},
    "SDXL": {
        **_ALL,
        "context_dim": 2048,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
}


class OtherModel:
    """A MODEL of one of `FAMILIES`."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Inputs, as the host asks for them."""
        return {"required": {"family": (list(FAMILIES),)}}

    def make(self, family: str) -> tuple[Any]:
        """The model."""
        config = comfy.model_detection.model_config_from_unet_config(dict(FAMILIES[family]))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("meta"))
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu),)


class PhotoList:
    """Two IMAGEs as a list, whatever their sizes."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("IMAGE",), "make", "tests", (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """As the host asks for it."""
        return {"required": {"first": ("IMAGE",), "second": ("IMAGE",)}}

    def make(self, first: Any, second: Any) -> tuple[list[Any]]:
        """The list."""
        return ([first, second],)


NODE_CLASS_MAPPINGS = {"TestOtherModel": OtherModel, "TestPhotoList": PhotoList}
