"""A made-up pristine model of NIQE's layout, and textures that have a NIQE."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_niqe_params(path: Path) -> Path:
    """An .npz with unit covariance."""
    window = np.full((7, 7), 1 / 49)
    np.savez(path, mu_pris_param=np.ones((1, 36)), cov_pris_param=np.eye(36), gaussian_window=window)
    return path


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """White noise in colour."""
    draws = np.random.Generator(np.random.PCG64(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(draws)
