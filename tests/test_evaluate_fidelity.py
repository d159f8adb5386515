"""PSNR and SSIM against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from trainer.evaluate.quality import fidelity
from trainer.evaluate.quality.fidelity import full_luma, psnr_y, ssim_y, studio_luma


def pictures(height: int, width: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth colour picture and a noisy version, uint8 (3, H, W)."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    noisy = (smooth + noise * torch.randn(smooth.shape, generator=g)).clamp(0, 1)
    return (255 * smooth).to(torch.uint8), (255 * noisy).to(torch.uint8)


def numpy_luma(image: Tensor) -> np.ndarray:
    return rgb2ycbcr(image.permute(1, 2, 0).numpy())[..., 0]


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("size", [(40, 56), (11, 64)])
def test_equal_to_scikit_image(size: tuple[int, int], noise: float) -> None:
    original, image = pictures(*size, noise)
    a, b = numpy_luma(original), numpy_luma(image)
    expected = structural_similarity(
        a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert psnr_y(image, original) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-6)
    assert ssim_y(image, original) == pytest.approx(expected, abs=1e-6)


def test_strips_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    original, image = pictures(70, 50, 0.1)
    whole = psnr_y(image, original), ssim_y(image, original)
    monkeypatch.setattr(fidelity, "_STRIP_PIXELS", 50 * 7)
    assert (psnr_y(image, original), ssim_y(image, original)) == pytest.approx(whole, rel=1e-12)


def test_lumas_of_known_colours() -> None:
    white, black, green = (torch.tensor(c, dtype=torch.uint8).view(3, 1, 1) for c in ([255] * 3, [0] * 3, [0, 255, 0]))
    assert [studio_luma(c).item() for c in (white, black)] == pytest.approx([235.0, 16.0])
    assert [full_luma(c).item() for c in (white, green)] == pytest.approx([255.0, 0.587 * 255])


def test_identical_pictures_and_tiny_ones() -> None:
    original, image = pictures(10, 30, 0.1)
    assert psnr_y(original, original) == 100.0
    assert ssim_y(image, original) is None
    large, _ = pictures(20, 30, 0.1)
    assert ssim_y(large, large) == pytest.approx(1.0)
