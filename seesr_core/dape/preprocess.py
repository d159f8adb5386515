"""From a photo to the tagger's input: resize to its square, then ImageNet statistics."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ImageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def tagger_input(
    image_B3HW: Tensor, size: int, *, antialias: bool = True, mode: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """Resize to `size`² without keeping the aspect, then normalise.

    The published test code shrinks large photos without antialiasing, because its torchvision did; here it is on by
    default, since aliasing spoils their tags. Stage 2 of the training uses `mode="bicubic", antialias=False`.

    Args:
        image_B3HW: RGB in [0, 1], any floating dtype.
        size: side of the tagger's input in pixels.
        antialias: low-pass filter when shrinking; makes no difference when enlarging.
        mode: interpolation; bicubic results are clamped to [0, 1].

    Returns:
        (B, 3, size, size) in the input's dtype; computed in float32.

    Raises:
        ImageError: not a floating (B, 3, H, W) tensor.
    """
    if image_B3HW.ndim != 4 or image_B3HW.shape[1] != 3 or not image_B3HW.is_floating_point():
        raise ImageError(
            f"The tagger's image should be a floating tensor of shape (B, 3, H, W) in [0, 1]; "
            f"found {image_B3HW.dtype} of shape {tuple(image_B3HW.shape)}."
        )
    resized = F.interpolate(image_B3HW.float(), (size, size), mode=mode, align_corners=False, antialias=antialias)
    return normalize(resized.clamp(0, 1) if mode == "bicubic" else resized).to(image_B3HW.dtype)


def normalize(image_B3HW: Tensor) -> Tensor:
    """[0, 1] RGB to zero mean and unit deviation over ImageNet, in the input's dtype."""
    mean, std = (image_B3HW.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image_B3HW - mean) / std


def denormalize(image_B3HW: Tensor) -> Tensor:
    """Inverse of `normalize`: back to RGB in [0, 1], in the input's dtype."""
    channels = zip(image_B3HW.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([channel * std + mean for channel, mean, std in channels], 1)


def require_square(x_B3HW: Tensor, size: int) -> None:
    """Refuse what an encoder for pictures of `size`² cannot take.

    Raises:
        ImageError: the shape is not (B, 3, size, size).
    """
    if x_B3HW.shape[1:] != (3, size, size):
        raise ImageError(
            f"The tagger takes images of shape (B, 3, {size}, {size}); found {tuple(x_B3HW.shape)}. "
            "Bring the image to that size with dape.tagger_input."
        )
