"""The photo before and after the networks: the upscaled LR picture that conditions them, and the finished result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL.Image import Image, fromarray
from torch import Tensor

from ..seesr_core.errors import ImageError
from ..seesr_core.method.color import COLOR_FIXES, ColorFix
from ..seesr_core.pictures.sizes import (
    MULTIPLE,
    check_prepared,
    final_size,
    finish,
    prepare,
    resize,
    to_pil,
    to_u8,
)
from ..seesr_core.pictures.target import TargetSize
from ..seesr_core.settings import MAX_SCALE, UpscaleSettings
from .host.report import warn_on_node
from .schema import (
    channels_first,
    folded,
    make_schema,
    require_finite,
    unit_range,
    view_channels_first,
)

_PUBLISHED = UpscaleSettings()
_RGBA = 4


def scale_input() -> io.Float.Input:
    """How many times larger the result is than the photo."""
    return io.Float.Input(
        "scale",
        default=4.0,
        min=0.05,
        max=MAX_SCALE,
        step=0.05,
        tooltip="Size of the result over the size of the photo. The model was trained for 4.",
    )


def to_input() -> io.String.Input:
    """The result's size in words."""
    return io.String.Input(
        "to",
        default="",
        optional=True,
        tooltip="The result's size, in place of scale: 3840 or 4k (longer side), 1080p (shorter side), 12MP, 1920x1080 "
        "(fits inside), 1920x1080 crop (fills it). Empty: scale.",
    )


def scale_for(image_BHWC: Tensor, scale: float, to: str) -> float:
    """`scale`, or what `to` means for photos of this size.

    Raises:
        SettingsError: `to` is no size. ImageError: no pictures.
    """
    return TargetSize.parse(to).scale_for(_size_of(view_channels_first(image_BHWC))) if to.strip() else scale


def cut_images(image_BHWC: Tensor, to: str) -> Tensor:
    """What `to` keeps of finished pictures: the middle where it fills a size, else all."""
    if not to.strip():
        return image_BHWC
    left, top, right, bottom = TargetSize.parse(to).box((image_BHWC.shape[2], image_BHWC.shape[1]))
    return image_BHWC[:, top:bottom, left:right]


def color_fix_input() -> io.Combo.Input:
    """How the result gets the photo's colours."""
    return io.Combo.Input(
        "color_fix",
        options=list(COLOR_FIXES),
        default="adain",
        tooltip="How the result gets the photo's colours: adain matches every channel's mean and spread, wavelet takes "
        "over everything coarse, none leaves the model's colours.",
    )


class SeeSRPrepareImage(io.ComfyNode):
    """The upscaled LR picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        min_size = folded(
            io.Int.Input(
                "min_size",
                default=512,
                min=0,
                max=4096,
                step=8,
                tooltip="A photo whose upscaled shorter side would be below this many pixels is enlarged more first; "
                "SeeSR Finish Image reduces the result again.",
            )
        )
        return make_schema(
            node_id="SeeSRPrepareImage",
            display_name="SeeSR Prepare Image",
            description="Upscales the photo (bicubic) to the size of the result, with sides that are multiples of 8. "
            "This picture conditions the ControlNet, starts the sampling and gives the result its colours.",
            search_aliases=["seesr prepare", "upscale image bicubic", "super resolution input", "resize for seesr"],
            inputs=[
                io.Image.Input("image", tooltip="The photo at its own, low resolution."),
                scale_input(),
                min_size,
                to_input(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The upscaled photo (“prepared”).")],
        )

    @classmethod
    def execute(cls, image: Tensor, scale: float, min_size: int, to: str = "") -> io.NodeOutput:
        """One prepared picture per photo."""
        return io.NodeOutput(prepare_images(image, scale=scale_for(image, scale, to), min_size=min_size))


class SeeSRFinishImage(io.ComfyNode):
    """Colours and final size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return make_schema(
            node_id="SeeSRFinishImage",
            display_name="SeeSR Finish Image",
            description="Gives the decoded picture the photo's colours and resizes it to exactly the photo's size × "
            "scale.",
            search_aliases=["seesr finish", "color fix", "colour correction", "adain", "wavelet color fix"],
            inputs=[
                io.Image.Input("image", lazy=True, tooltip="The decoded picture, from VAE Decode."),
                io.Image.Input("prepared", tooltip="The upscaled photo, from SeeSR Prepare Image."),
                io.Image.Input("lr_image", tooltip="The photo itself; its size × scale is the size of the result."),
                scale_input(),
                color_fix_input(),
                to_input(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The finished picture.")],
        )

    @classmethod
    def check_lazy_status(cls, prepared: Tensor, lr_image: Tensor, scale: float, to: str = "", **_: Any) -> list[str]:
        """Ask for the decoded picture only once the others fit together: before anything is sampled."""
        check_pair(prepared, lr_image, scale_for(lr_image, scale, to))
        return ["image"]

    @classmethod
    def execute(
        cls, image: Tensor, prepared: Tensor, lr_image: Tensor, scale: float, color_fix: ColorFix, to: str = ""
    ) -> io.NodeOutput:
        """One finished picture per decoded one."""
        scale = scale_for(lr_image, scale, to)
        return io.NodeOutput(cut_images(finish_images(image, prepared, lr_image, scale=scale, color_fix=color_fix), to))


def prepare_images(image_BHWC: Tensor, *, scale: float, min_size: int) -> Tensor:
    """The upscaled photos (B, 8h, 8w, 3), float32 on 8-bit levels.

    Raises:
        ImageError: no photos, or some that hold NaN.
        SettingsError: `scale` or `min_size` is out of range.
    """
    return unit_range(prepare_levels(image_BHWC, scale=scale, min_size=min_size))


def prepare_levels(image_BHWC: Tensor, *, scale: float, min_size: int) -> Tensor:
    """The same as uint8, a quarter of the memory: every function here and below takes either.

    Raises:
        ImageError: no photos, or some that hold NaN.
        SettingsError: `scale` or `min_size` is out of range.
    """
    photos = to_levels(image_BHWC, "the photo")
    return from_pil([prepare(photo, scale=scale, min_size=min_size) for photo in map(to_pil, photos)])


def finish_images(
    image_BHWC: Tensor, prepared_BHWC: Tensor, lr_BHWC: Tensor, *, scale: float, color_fix: ColorFix
) -> Tensor:
    """The finished pictures: colours of `prepared`, size of `lr` × `scale`; a single photo serves a whole batch.

    (B, H, W, 3), or 4 channels where the photos have transparency, which is enlarged beside the colours.

    Raises:
        ImageError: counts or sizes that do not belong together, or NaN.
        SettingsError: unknown colour fix.
    """
    decoded = to_levels(image_BHWC, "the decoded picture")
    count = len(decoded)
    prepared = _one_each(to_levels(prepared_BHWC, "the prepared picture"), count, "prepared")
    lr = _one_each(view_channels_first(lr_BHWC), count, "lr_image")
    _check_same_size(decoded, prepared)
    check_pair(prepared_BHWC, lr_BHWC, scale)
    lr_size = _size_of(lr)
    finished = [
        finish(picture, reference, lr_size=lr_size, scale=scale, color_fix=color_fix)
        for picture, reference in zip(decoded, prepared, strict=True)
    ]
    colours = unit_range(from_pil(finished))
    if lr_BHWC.shape[-1] < _RGBA:
        return colours
    alpha = unit_range(_enlarged_alpha(lr_BHWC[..., _RGBA - 1], finished[0].size))
    return torch.cat([colours, alpha.expand(count, -1, -1, -1)], dim=-1)


def _enlarged_alpha(alpha_BHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Transparency (B, height, width, 1) of results of `size`, uint8."""
    masks = [fromarray(mask.cpu().numpy()) for mask in to_u8(alpha_BHW)]
    return from_pil([resize(mask, size) for mask in masks])[..., None]


def check_pair(prepared_BHWC: Tensor, lr_BHWC: Tensor, scale: float) -> None:
    """Refuse prepared pictures and photos that do not belong together at `scale`.

    Raises:
        ImageError: no pictures, or pictures of other sizes than SeeSR Prepare Image makes.
    """
    prepared, lr = (_size_of(view_channels_first(picture)) for picture in (prepared_BHWC, lr_BHWC))
    check_prepared(prepared, lr, scale)
    final = final_size(lr, scale)
    if min(prepared) > max(_PUBLISHED.min_size, min(final) + MULTIPLE):
        warn_on_node(
            f"SeeSR Finish Image reduces the result from {prepared[0]}×{prepared[1]} to {final[0]}×{final[1]}: its "
            "scale is lower than that of SeeSR Prepare Image, or min_size there enlarged the photo."
        )


def to_levels(image_BHWC: Tensor, name: str) -> Tensor:
    """The host's pictures as uint8 (B, 3, H, W); `name` begins the sentence about NaN.

    The published implementation rounds to 8 bits here, too: after decoding, before its colour fix.
    """
    if image_BHWC.dtype == torch.uint8:
        return view_channels_first(image_BHWC)
    image_B3HW = channels_first(image_BHWC)
    advice = "expected levels from 0 to 1. Look for the node that made them: half precision is the usual cause"
    require_finite(image_B3HW, f"{name[0].upper()}{name[1:]}", advice, ImageError)
    return to_u8(image_B3HW)


def from_pil(pictures: Sequence[Image]) -> Tensor:
    """PIL pictures of one size as levels (B, H, W, 3), uint8."""
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])


def _one_each(pictures: Tensor, count: int, name: str) -> Tensor:
    if len(pictures) not in (1, count):
        raise ImageError(
            f"{name} holds {len(pictures)} pictures for {count} decoded ones: expected as many, or one for all."
        )
    return pictures.expand(count, -1, -1, -1)


def _check_same_size(decoded: Tensor, prepared: Tensor) -> None:
    if decoded.shape != prepared.shape:
        raise ImageError(
            f"The decoded picture has {_text(decoded)} pixels and the prepared one {_text(prepared)}: expected the "
            "same size. Connect the output of SeeSR Prepare Image that conditioned this result."
        )


def _text(image_B3HW: Tensor) -> str:
    return "{}×{}".format(*_size_of(image_B3HW))


def _size_of(image_B3HW: Tensor) -> tuple[int, int]:
    return image_B3HW.shape[-1], image_B3HW.shape[-2]
