"""Steps of a graph of the small nodes, for tests that connect nodes by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .locate import plugin

NEGATIVE = "dotted, noise, blur, lowres, smooth"
ADDED = "clean, high-resolution, 8k"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load Checkpoint's outputs by the name of the input they go to."""
    import comfy.sd

    plugin("nodes.host.nano").register()
    loaded: Any = comfy.sd.load_checkpoint_guess_config(str(path))
    return dict(zip(("model", "clip", "vae"), loaded[:3], strict=True))


def applied(
    model: Any, positive: Sequence[Any], negative: Any, seesr_model: Any, soft_prompt: Tensor, image: Tensor
) -> tuple[Any, Any, Any]:
    """SeeSR Apply's outputs at its own strengths; the host gives it every input as a list."""
    strengths = {"strength": [1.0], "rca_strength": [1.0], "start_percent": [0.0], "end_percent": [1.0]}
    model_list, positives, negatives = (
        plugin("nodes.apply")
        .SeeSRApply.execute(
            model=[model],
            positive=list(positive),
            negative=[negative],
            seesr_model=[seesr_model],
            soft_prompt=[soft_prompt],
            image=[image],
            **strengths,
        )
        .result
    )
    return model_list[0], positives[0], negatives[0]
