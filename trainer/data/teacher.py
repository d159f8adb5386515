"""A super-resolution network whose results a student learns from: any file that spandrel loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seesr_core.errors import WeightsError

_BORDER = 8
"""LR pixels that are mirrored around a crop, so that the network does not see where it ends."""


class Teacher:
    """A deterministic network from LR to SR, frozen.

    Args:
        model: spandrel's descriptor of an image model.
        scale: factor that is asked for.
        device: where it computes.

    Raises:
        WeightsError: the network does something else than enlarge colour pictures by `scale`.
    """

    def __init__(self, model: Any, *, scale: int, device: torch.device) -> None:
        found = (model.purpose, model.scale, model.input_channels, model.output_channels)
        if found != ("SR", scale, 3, 3):
            raise WeightsError(
                f"The teacher should enlarge colour pictures {scale} times, but {model.architecture.name} is made for "
                f"{found[0]} ×{found[1]} with {found[2]} channels; give a super-resolution model of that scale."
            )
        self.scale = scale
        self.model = model.eval().to(device)
        self.model.model.requires_grad_(False)

    @classmethod
    def of_file(cls, path: Path, *, scale: int = 4, device: torch.device | None = None) -> Teacher:
        """The teacher in a `.pth` or `.safetensors` file.

        Raises:
            WeightsError: spandrel is missing, does not know the file, or the network does not fit.
        """
        try:
            import spandrel
        except ImportError as error:
            how = "`pip install 'comfyui-seesr[spandrel]'`"
            raise WeightsError(f"A teacher's file is read by spandrel: {how}.") from error
        try:
            model = spandrel.ModelLoader().load_from_file(path)
        except (OSError, RuntimeError, ValueError, spandrel.UnsupportedModelError) as error:
            raise WeightsError(f"{path} cannot be a teacher: spandrel does not read it ({error}).") from error
        return cls(model, scale=scale, device=device or torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, lr_B3HW: Tensor) -> Tensor:
        """SR (B, 3, scale·H, scale·W) in [0, 1] of LR in [0, 1]."""
        border = min(_BORDER, *(side - 1 for side in lr_B3HW.shape[-2:]))
        padded = F.pad(lr_B3HW, (border,) * 4, mode="reflect")
        result: Tensor = self.model(padded.contiguous(memory_format=torch.channels_last))
        cut = border * self.scale
        height, width = result.shape[-2:]
        return result[..., cut : height - cut, cut : width - cut].float().clamp(0, 1)
