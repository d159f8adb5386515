"""The figures of a picture, with the settings that they depend on."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seesr_core.errors import DataError

from .deep import DeepDistance
from .fidelity import IDENTICAL_DB, full_luma_rows, psnr_y, ssim_y
from .metrics import DEEP
from .niqe import BLOCK, FEATURES, NiqeModel, niqe_of_rows

Figures = dict[str, float]
"""Figures by name; one that could not be computed is not in it."""

_MOST_BYTES = 1 << 24
"""Of a NIQE model; the published one has 11 kB."""

SETTINGS = {
    "picture": "whole picture, no border cut off, 8 bits, RGB",
    "psnr_y": "dB; Y of YCbCr, BT.601 studio range (16-235), not rounded; peak 255; "
    f"identical pictures count as {IDENTICAL_DB:g}",
    "ssim_y": "the same Y; Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, range 255, full windows only",
    DEEP: "EfficientNet-Lite0: features of 4 stages at unit length, squared differences, mean over places and stages",
    "niqe": f"Y of BT.601 full range (0-255), rounded; blocks of {BLOCK}x{BLOCK} from the top left, two scales, "
    "MATLAB-like bicubic between them; lower is better",
}
"""How each figure is computed, for reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """Computes what can be computed of a picture."""

    niqe_model: NiqeModel | None = None
    """Statistics of pristine photos; None leaves NIQE out."""
    deep: DeepDistance | None = None
    """Judge of deep features; None leaves their distance out."""

    def __call__(self, image_3HW: Tensor, original_3HW: Tensor | None = None) -> Figures:
        """The figures of a uint8 RGB picture (3, H, W): NIQE, and PSNR, SSIM and the distance of deep features
        where there is an original.

        Raises:
            DataError: the two differ in size.
        """
        found: dict[str, float | None] = {}
        if original_3HW is not None:
            if image_3HW.shape != original_3HW.shape:
                raise DataError(
                    f"it has {_size(image_3HW)} pixels, its original {_size(original_3HW)}; "
                    "only pictures of one size can be compared."
                )
            found["psnr_y"] = psnr_y(image_3HW, original_3HW)
            found["ssim_y"] = ssim_y(image_3HW, original_3HW)
            if self.deep is not None:
                found[DEEP] = self.deep(image_3HW, original_3HW)
        if self.niqe_model is not None:
            found["niqe"] = niqe_of_rows(full_luma_rows(image_3HW), image_3HW.shape[1:], self.niqe_model)
        return {name: value for name, value in found.items() if value is not None}


def _size(image_3HW: Tensor) -> str:
    return f"{image_3HW.shape[2]}×{image_3HW.shape[1]}"


def read_niqe_model(path: Path) -> NiqeModel:
    """NIQE's pristine model from an .npz with `mu_pris_param`, `cov_pris_param` and `gaussian_window`.

    Raises:
        DataError: missing, no such file, or of other shapes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"it holds more than {_MOST_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as data:
            mean, covariance, window = (
                torch.from_numpy(data[name].astype(np.float64))
                for name in ("mu_pris_param", "cov_pris_param", "gaussian_window")
            )
    except Exception as error:  # numpy passes on whatever zip, zlib and its own parsers raise
        raise DataError(
            f"{path} should hold mu_pris_param, cov_pris_param and gaussian_window as .npz, but cannot be read so "
            f"({error}); give NIQE's published parameters."
        ) from error
    sides = window.shape
    if mean.numel() != FEATURES or covariance.shape != (FEATURES, FEATURES) or len(set(sides)) != 1 or len(sides) != 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (mean, covariance, window))
        raise DataError(f"{path} should hold {FEATURES} means, their covariance and a square window, found {shapes}.")
    return NiqeModel(mean=mean.flatten(), covariance=covariance, window=window)


def means(pictures: Iterable[Mapping[str, float]]) -> tuple[Figures, dict[str, int]]:
    """The mean of each figure over the pictures that have it, and how many these are."""
    values: dict[str, list[float]] = {}
    for figures in pictures:
        for name, value in figures.items():
            values.setdefault(name, []).append(value)
    return {name: sum(v) / len(v) for name, v in values.items()}, {name: len(v) for name, v in values.items()}
