"""The deep-feature distance of two pictures as they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from seesr_core.errors import WeightsError
from seesr_core.pictures.sizes import from_u8

from ...deep_features import EfficientNetLite0, distance, load_efficientnet


@dataclass(frozen=True, slots=True)
class DeepDistance:
    """Compares pictures by `trainer.deep_features.distance`, each as a whole and at its own size."""

    network: EfficientNetLite0
    """The network that sees the features."""
    device: torch.device
    """Device that the network is on."""

    @classmethod
    def load(cls, path: Path | None = None, device: torch.device | None = None) -> DeepDistance:
        """The network from a file, or from its package where none is named.

        Raises:
            WeightsError: neither can be had.
        """
        place = device or torch.device("cpu")
        return cls(load_efficientnet(path).to(place), place)

    @classmethod
    def find(cls, path: Path | None = None) -> DeepDistance | None:
        """The same; None if no file is named and the package is not installed.

        Raises:
            WeightsError: the file that is named cannot be used.
        """
        try:
            return cls.load(path)
        except WeightsError:
            if path:
                raise
            return None

    @torch.no_grad()
    def __call__(self, image_3HW: Tensor, original_3HW: Tensor) -> float:
        """The distance of two uint8 RGB pictures (3, H, W) of one size; 0 for equal ones."""
        images = (from_u8(image[None].to(self.device)) for image in (image_3HW, original_3HW))
        one, other = (self.network.features(image) for image in images)
        return float(distance(one, other))
