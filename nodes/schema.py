"""What every node shares: schemas that old hosts accept, our own types, and the layout at the node's edge.

The host keeps pictures as (B, H, W, C) in [0, 1]; the method works on (B, C, H, W). Layout is converted here and
nowhere else.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..seesr_core.errors import ImageError, SeeSRError, SettingsError

CATEGORY = "SeeSR"

DAPEType = io.Custom("SEESR_DAPE")
"""A tagger: `nodes.host.dape.HostDAPE`."""
ModelType = io.Custom("SEESR_MODEL")
"""ControlNet and RCA: `nodes.host.seesr_model.SeeSRModel`."""
SegSRType = io.Custom("SEGSR_MODEL")
"""SegDM and bridge: `nodes.host.segsr.SegSRModel`."""
SoftPromptType = io.Custom("SEESR_SOFT_PROMPT")
"""Soft prompt (B, L, D), float32 on the CPU."""

ADVANCED: dict[str, Any] = {"advanced": True}
"""`extra_dict` of an input that newer hosts fold away; older ones know no such argument and ignore the entry."""


def folded(entry: Any) -> Any:
    """The same input, folded away by newer hosts until someone asks for more."""
    entry.extra_dict = ADVANCED
    return entry


def make_schema(**given: Any) -> io.Schema:
    """An `io.Schema` in our category of whatever this host's schema knows; an unknown keyword would drop the plugin.

    Outputs carry a `display_name` and no id: ids may not repeat those of inputs, and older hosts ignore them.
    """
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{"category": CATEGORY, **{name: value for name, value in given.items() if name in known}})


def channels_first(image_BHWC: Tensor) -> Tensor:
    """The host's picture (B, H, W, C ≥ 3) as (B, 3, H, W) float32 in [0, 1]; further channels are left out.

    Raises:
        ImageError: not a batch of colour pictures.
    """
    return unit_range(view_channels_first(image_BHWC))


def view_channels_first(image_BHWC: Tensor) -> Tensor:
    """The same as a view of the given picture, values and type as they are; `unit_range` does the rest.

    Raises:
        ImageError: not a batch of colour pictures.
    """
    if image_BHWC.ndim == 4 and 0 in image_BHWC.shape:
        raise ImageError(
            f"The IMAGE is empty, {tuple(image_BHWC.shape)} of pictures, height, width and channels: expected at least "
            "one picture of one pixel. Look at the node that made it, such as a batch of which nothing is left."
        )
    if image_BHWC.ndim != 4 or image_BHWC.shape[3] < 3:
        raise ImageError(
            f"Expected an IMAGE of shape (batch, height, width, 3), found {tuple(image_BHWC.shape)}; "
            "connect a node that gives colour pictures, such as Load Image."
        )
    return image_BHWC[..., :3].movedim(-1, 1)


def unit_range(picture: Tensor) -> Tensor:
    """A picture of any layout, host's values or uint8 levels, as float32 in [0, 1]."""
    if picture.dtype == torch.uint8:
        return picture.float().div_(255.0)
    return picture.float().clamp(0.0, 1.0)


def is_finite(picture: Tensor) -> bool:
    """Whether no value is NaN or infinite; unlike `isfinite` on the whole of it, this takes no further memory."""
    return picture.dtype == torch.uint8 or all(bool(torch.isfinite(value)) for value in picture.aminmax())


def require_finite(values: Tensor, name: str, advice: str, error: type[SeeSRError] = SettingsError) -> None:
    """Refuse `values`, which the sentence calls `name`, if one of them is NaN or infinite; `advice` ends the sentence.

    Raises:
        SeeSRError: of the kind `error`.
    """
    if not is_finite(values):
        raise error(f"{name} holds values that are no numbers (NaN or infinite); {advice}.")
