"""Ids, order and defaults of inputs that saved graphs depend on."""

from __future__ import annotations

from typing import Any

import pytest

from .locate import plugin
from .small_nodes import ADDED, NEGATIVE

CONTRACT: dict[str, dict[str, Any]] = {
    "image.SeeSRPrepareImage": {"image": ..., "scale": 4.0, "min_size": 512, "to": ""},
    "image.SeeSRFinishImage": {
        "image": ...,
        "prepared": ...,
        "lr_image": ...,
        "scale": 4.0,
        "color_fix": "adain",
        "to": "",
    },
    "prompts.SeeSRExtractTags": {"dape": ..., "image": ..., "threshold": 1.0, "exclude": "", "language": "en"},
    "prompts.SeeSRPrompt": {"tags": ..., "prompt": "", "added_prompt": ADDED},
    "prompts.SeeSRSoftPrompt": {"dape": ..., "image": ...},
    "upscale.SeeSRUpscale": {
        **dict.fromkeys(("image", "model", "clip", "vae", "dape", "seesr_model"), ...),
        "scale": 4.0,
        "steps": 50,
        "cfg": 5.5,
        "seed": 0,
        "prompt": "",
        "added_prompt": ADDED,
        "negative_prompt": NEGATIVE,
        "sampler_name": "ddpm",
        "start_timestep": 999,
        "tile_size": 768,
        "overlap": 32,
        "color_fix": "adain",
        "local_prompts": "off",
        "fidelity": 0.0,
        "preset": "from the model",
        "to": "",
        "tags": "",
        "exclude": "",
        "threshold": 1.0,
        "strength": 1.0,
        "rca_strength": 1.0,
    },
    "regions.SeeSRGroundTags": {"dape": ..., "image": ..., "threshold": 1.0, "exclude": "", "language": "en"},
    "regions.SeeSRRegionPrompt": {
        "clip": ...,
        "tags": ...,
        "masks": ...,
        "prompt": "",
        "added_prompt": ADDED,
        "strength": 1.0,
    },
    "local.SeeSRTilePrompts": {
        **dict.fromkeys(("dape", "clip", "image", "prepared"), ...),
        "tile_size": 768,
        "overlap": 32,
        "use": "tags + soft prompt",
        "keep_global": True,
        "threshold": 1.0,
        "exclude": "",
        "prompt": "",
        "added_prompt": ADDED,
    },
    "steering.SeeSRSpatialGuidance": {"model": ..., "mask": ..., "outside": 0.0, "feather": 16},
    "steering.SeeSRFidelity": {"model": ..., "latent": ..., "fidelity": 0.0, "decay": 4.0},
    "segsr.SegSRLoadModel": {"model_name": ...},
    "segsr.SegSRApply": {
        **dict.fromkeys(("model", "positive", "negative", "segsr_model", "image", "dape", "soft_prompt"), ...),
        "strength": 1.0,
        "segmentation": ...,
    },
    "segsr.SegSRSegmentation": {"latent": ...},
}
"""Ids, order and defaults that saved graphs depend on."""


@pytest.mark.parametrize("node", CONTRACT)
def test_inputs_are_those_of_saved_graphs(node: str) -> None:
    module, name = node.split(".")
    schema = getattr(plugin(f"nodes.{module}"), name).define_schema()
    assert schema.node_id == name
    assert [entry.id for entry in schema.inputs] == list(CONTRACT[node])
    for entry, default in zip(schema.inputs, CONTRACT[node].values(), strict=True):
        assert entry.tooltip, entry.id
        assert default is ... or entry.default == default, entry.id
    assert schema.description
    assert schema.category == "SeeSR"


def test_published_sampler_comes_first_and_none_of_the_host_s_is_missing() -> None:
    import comfy.samplers

    names = plugin("nodes.upscale").sampler_names()
    assert names[0] == "ddpm"
    assert sorted(names) == sorted(comfy.samplers.SAMPLER_NAMES)
