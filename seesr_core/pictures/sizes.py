"""Pictures into and out of the method: sizes, resizes, tensors, the finishing resize to exactly LR size × scale.

Sizes are (width, height) in pixels, as in PIL. Tensors are (3, H, W) or (B, 3, H, W) in [0, 1] unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import ImageError, SettingsError
from ..method.color import ColorFix, color_fix

Size = tuple[int, int]
Picture = Image.Image | NDArray[np.uint8]

MULTIPLE = 8
_LONG = 4
"""Longer side over shorter side from which a small photo is padded rather than enlarged."""
_MOST_ENLARGED = 2
"""How many times such a photo is enlarged at most, if that is more."""
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The sizes that a picture of size `lr` passes through."""

    lr: Size
    """Size of the photo."""
    enlarged: Size
    """After small photos were enlarged, so that the upscaled one reaches about the minimum side; else `lr`."""
    upscaled: Size
    """`enlarged` × scale."""
    prepared: Size
    """`upscaled` cut down to multiples of 8 by resizing, its shorter side padded if need be: what the networks see."""
    final: Size
    """`lr` × scale: what comes out."""


def prepare_size(width: int, height: int, *, scale: float = 4.0, min_size: int = 512) -> Sizes:
    """Sizes on the way from the photo to the result, as the published implementation computes them.

    Photos with a side below floor(min_size / scale) are enlarged to it first. Sides round down, by float arithmetic as
    published: a prepared side can miss `min_size` by a few pixels (49 px × 4 gives 504). Unlike the published one, this
    bounds the work on long thin photos: they are enlarged until the longer side reaches four times that minimum, or to
    twice their size if that is more, and the rest of the shorter side is padded (see `content_box`).

    Raises:
        ImageError: the picture is empty.
        SettingsError: `scale` or `min_size` is out of range.
    """
    if min(width, height) < 1:
        raise ImageError(f"The picture is {width}×{height} pixels: expected at least 1×1.")
    if not 0.0 < scale <= 64.0:
        raise SettingsError(f"The scale must be above 0 and at most 64, not {scale:g}.")
    if min_size < 0:
        raise SettingsError(f"The minimum size must not be negative, it is {min_size}.")
    shortest = int(min_size // scale)
    enlarged = _enlarge((width, height), shortest)
    upscaled = _times(enlarged, scale)
    prepared = (_round_down(upscaled[0]), _round_down(upscaled[1]))
    if min(enlarged) < shortest:
        prepared = _padded(prepared, (width, height), _round_down(int(shortest * scale)), scale)
    return Sizes(
        lr=(width, height),
        enlarged=enlarged,
        upscaled=upscaled,
        prepared=prepared,
        final=final_size((width, height), scale),
    )


def content_box(prepared: Size, lr: Size, scale: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of a prepared picture that shows the photo of size `lr`.

    All of it, but for a long thin photo whose shorter side was padded: the middle, in the photo's proportions.
    """
    short = int(prepared[0] > prepared[1])
    filled = _filled(prepared, lr)
    if max(lr) <= _LONG * min(lr) or prepared[short] - filled <= _slack(scale):
        return (0, 0, *prepared)
    start = (prepared[short] - filled) // 2
    if short == 0:
        return (start, 0, start + filled, prepared[1])
    return (0, start, prepared[0], start + filled)


def check_prepared(prepared: Size, lr: Size, scale: float) -> None:
    """Refuse a prepared picture that is not of a photo of size `lr`, or too small for its size × `scale`.

    Raises:
        ImageError: either.
    """
    left, top, right, bottom = content_box(prepared, lr, scale)
    sides = (right - left, bottom - top)
    slack = _slack(max(scale, *(side / photo for side, photo in zip(sides, lr, strict=True))))
    # Both sides were upscaled alike, up to what was cut off them; a padded picture's shorter one follows the other.
    measured = [(side, photo) for side, photo in zip(sides, lr, strict=True) if side % MULTIPLE == 0]
    most = min((side + slack) / photo for side, photo in measured)
    least = max((side - 1) / photo if side > MULTIPLE else 0.0 for side, photo in measured)
    if least > most:
        raise ImageError(
            f"The prepared picture has {_pixels(prepared)} pixels, which is no enlargement of a photo of "
            f"{_pixels(lr)}: connect the same photo to SeeSR Prepare Image and to lr_image."
        )
    if most < scale:
        raise ImageError(
            f"The prepared picture has {_pixels(prepared)} pixels, too few for the photo's {_pixels(lr)} × {scale:g}: "
            "the result would be blurred. Set the same scale as in SeeSR Prepare Image."
        )


def _pixels(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


def final_size(lr_size: Size, scale: float) -> Size:
    """LR size × scale, to the nearest pixel and at least one."""
    return _times(lr_size, scale)


def _enlarge(size: Size, shortest: int) -> Size:
    if min(size) >= shortest:
        return size
    factor = min(shortest / min(size), max(_MOST_ENLARGED, _LONG * shortest / max(size)))
    return max(int(factor * size[0]), 1), max(int(factor * size[1]), 1)


def _padded(prepared: Size, lr: Size, shortest: int, scale: float) -> Size:
    """`prepared` with its shorter side padded to `shortest`, unless little is missing."""
    filled = _filled(prepared, lr)
    side = shortest if shortest - filled > _slack(scale) else _round_down(filled)
    return (side, prepared[1]) if prepared[0] < prepared[1] else (prepared[0], side)


def _filled(prepared: Size, lr: Size) -> int:
    """The shorter side of the photo in a prepared picture, by its longer one."""
    return max(round(max(prepared) * min(lr) / max(lr)), 1)


def _slack(scale: float) -> float:
    """Pixels that a prepared side may miss or exceed: one of the photo, and what rounding to multiples cuts off."""
    return scale + MULTIPLE + 1


def _times(size: Size, scale: float) -> Size:
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _round_down(side: int) -> int:
    return max(side // MULTIPLE * MULTIPLE, MULTIPLE)


def prepare(image: Picture, *, scale: float = 4.0, min_size: int = 512) -> Image.Image:
    """The picture that conditions the networks: upscaled LR, RGB, sides multiples of 8 (see `prepare_size`).

    Each resize is PIL's bicubic on 8 bits, as the published implementation.

    Raises:
        ImageError: not a picture of at least 1×1 pixels.
        SettingsError: `scale` or `min_size` is out of range.
    """
    rgb = as_rgb(image)
    sizes = prepare_size(*rgb.size, scale=scale, min_size=min_size)
    left, top, right, bottom = content_box(sizes.prepared, sizes.lr, scale)
    for size in (sizes.enlarged, sizes.upscaled, (right - left, bottom - top)):
        rgb = resize(rgb, size)
    return _mirrored(rgb, sizes.prepared, (left, top))


def _mirrored(image: Image.Image, size: Size, place: Size) -> Image.Image:
    """`image` at `place` of a picture of `size`, mirrored over and over around it."""
    if image.size == size:
        return image
    before = place[::-1]
    margins = [(b, whole - b - part) for b, whole, part in zip(before, size[::-1], image.size[::-1], strict=True)]
    return Image.fromarray(np.pad(np.asarray(image), [*margins, (0, 0)], mode="symmetric"))


def resize(image: Image.Image, size: Size) -> Image.Image:
    """PIL's bicubic resize (antialiased when shrinking); the same picture where the size already fits."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def finish(
    image: Tensor | Picture,
    prepared: Tensor | Picture,
    *,
    lr_size: Size,
    scale: float = 4.0,
    color_fix: ColorFix = "adain",
) -> Image.Image:
    """The finished picture: colours fixed against `prepared`, then resized to exactly `lr_size` × `scale`.

    What was padded (see `content_box`) is cut off first. `image` and `prepared` are one picture each, of one size: PIL,
    uint8 (H, W, 3) or a float tensor (3, H, W).
    The colour fix runs in float32 a channel at a time and, as published, is cut (not rounded) to 8 bits.

    Raises:
        ImageError: the two differ in size.
        SettingsError: unknown colour fix.
    """
    image_3HW, prepared_3HW = _as_chw(image), _as_chw(prepared)
    left, top, right, bottom = content_box((image_3HW.shape[-1], image_3HW.shape[-2]), lr_size, scale)
    shown = (..., slice(top, bottom), slice(left, right))
    fixed = _fix_colors(image_3HW[shown], prepared_3HW[shown], color_fix)
    return resize(to_pil(fixed), final_size(lr_size, scale))


def _fix_colors(image_3HW: Tensor, prepared_3HW: Tensor, method: ColorFix) -> Tensor:
    if method == "none":
        return to_u8(_as_float(image_3HW))
    if image_3HW.shape != prepared_3HW.shape:
        raise ImageError(
            f"Colour fix needs the prepared picture at the result's size {_size_text(image_3HW)}, "
            f"found {_size_text(prepared_3HW)}: pass the picture that conditioned the result."
        )
    channels = zip(image_3HW.split(1), prepared_3HW.split(1), strict=True)
    return torch.cat([to_u8(color_fix(_as_float(a)[None], _as_float(b)[None], method)[0], "cut") for a, b in channels])


def _size_text(image_3HW: Tensor) -> str:
    return f"{image_3HW.shape[-1]}×{image_3HW.shape[-2]}"


def _as_chw(image: Tensor | Picture) -> Tensor:
    if not isinstance(image, Tensor):
        return torch.from_numpy(np.asarray(as_rgb(image)).copy()).permute(2, 0, 1)
    if image.ndim == 4 and len(image) == 1:
        image = image[0]
    if image.ndim != 3 or len(image) != 3:
        raise ImageError(f"Expected one picture of shape (3, H, W), found {tuple(image.shape)}.")
    return image


def _as_float(image: Tensor) -> Tensor:
    return from_u8(image) if image.dtype == torch.uint8 else image.float()


def from_u8(levels: Tensor) -> Tensor:
    """A picture in [0, 1], float32, of levels 0 … 255, any shape."""
    return levels.float() / 255.0


def to_u8(image: Tensor, rounding: Literal["nearest", "cut"] = "nearest") -> Tensor:
    """Levels 0 … 255 of a picture in [0, 1], any shape, clamped; "cut" drops the fraction, as published."""
    levels = image.float().clamp(0.0, 1.0).mul(255.0)
    return (levels.round_() if rounding == "nearest" else levels).to(torch.uint8)


def to_tensor(image: Picture) -> Tensor:
    """A picture as float32 (1, 3, H, W) in [0, 1]."""
    return _as_float(_as_chw(image))[None]


def to_pil(image_3HW: Tensor) -> Image.Image:
    """An RGB picture of a tensor (3, H, W) or (1, 3, H, W): uint8, or float in [0, 1] (clamped and rounded)."""
    levels = _as_chw(image_3HW)
    levels = levels if levels.dtype == torch.uint8 else to_u8(levels)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def as_rgb(image: Picture) -> Image.Image:
    """An 8-bit RGB picture of anything PIL opens (16-bit grey is scaled, alpha dropped) or a uint8 array (H, W, 3).

    Raises:
        ImageError: neither of these.
    """
    if isinstance(image, Image.Image):
        return _pil_as_rgb(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(np.ascontiguousarray(image))
    found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
    raise ImageError(f"Expected a PIL picture or a uint8 array of shape (H, W, 3), found {found}.")


def _pil_as_rgb(image: Image.Image) -> Image.Image:
    if image.mode not in _SIXTEEN_BIT:
        return image.convert("RGB")
    # PIL's own conversion clips 16-bit values at 255 instead of scaling them.
    levels = np.clip(np.rint(np.asarray(image, dtype=np.float32) / 257.0), 0, 255).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")
