"""NIQE against a second computation with numpy and scipy, written pixel by pixel from the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import convolve, gaussian_filter
from scipy.special import gamma

from seesr_core.errors import DataError
from trainer.evaluate.quality import niqe as module
from trainer.evaluate.quality.measure import read_niqe_model
from trainer.evaluate.quality.niqe import NiqeModel, niqe

Array = NDArray[np.float64]

GRID = np.arange(200, 10001) / 1000
GRID_RATIO = gamma(2 / GRID) ** 2 / (gamma(1 / GRID) * gamma(3 / GRID))


def window() -> Array:
    distance = np.square(np.arange(-3, 4))
    weights = np.exp(-(distance[:, None] + distance[None]) / (2 * (7 / 6) ** 2))
    return weights / weights.sum()


def texture(seed: int, height: int = 288, width: int = 288) -> Array:
    """Levels with the spectrum of natural pictures."""
    noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    field = np.fft.ifft2(noise / (frequency + 0.02)).real
    return np.clip(128 + 45 * field / field.std(), 0, 255).round()


def half_size(luma: Array) -> Array:
    """MATLAB's imresize by 0.5: the cubic kernel stretched over 8 pixels, borders mirrored."""
    t = np.abs(np.arange(-3.5, 4) / 2)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    kernel = np.where(t <= 1, near, far)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(luma, [(3, 4) if axis == a else (0, 0) for a in (0, 1)], mode="symmetric")
        luma = np.apply_along_axis(lambda line: np.convolve(line, kernel, "valid"), axis, padded)
        luma = luma[::2] if axis == 0 else luma[:, ::2]
    return luma


def fit(x: Array) -> tuple[float, float, float]:
    left, right = np.sqrt(np.mean(x[x < 0] ** 2)), np.sqrt(np.mean(x[x > 0] ** 2))
    g = left / right
    ratio = np.mean(np.abs(x)) ** 2 / np.mean(x**2) * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
    alpha = GRID[np.argmin((GRID_RATIO - ratio) ** 2)]
    spread = np.sqrt(gamma(1 / alpha) / gamma(3 / alpha))
    return alpha, left * spread, right * spread


def block_features(block: Array) -> list[float]:
    alpha, left, right = fit(block)
    found = [alpha, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        alpha, left, right = fit(block * np.roll(block, shift, (0, 1)))
        found += [alpha, (right - left) * gamma(2 / alpha) / gamma(1 / alpha), left, right]
    return found


def features(luma: Array) -> Array:
    rows: list[list[float]] = [[] for _ in range((luma.shape[0] // 96) * (luma.shape[1] // 96))]
    luma = luma[: luma.shape[0] // 96 * 96, : luma.shape[1] // 96 * 96]
    for side in (96, 48):
        mean = convolve(luma, window(), mode="nearest")
        deviation = np.sqrt(np.abs(convolve(luma**2, window(), mode="nearest") - mean**2))
        x = (luma - mean) / (deviation + 1)
        corners = [(i, j) for i in range(0, x.shape[0], side) for j in range(0, x.shape[1], side)]
        for row, (i, j) in zip(rows, corners, strict=True):
            row += block_features(x[i : i + side, j : j + side])
        luma = half_size(luma)
    return np.array(rows)


@pytest.fixture(scope="module")
def model() -> NiqeModel:
    """Pristine statistics of textures."""
    pristine = np.concatenate([features(texture(seed, 192, 192)) for seed in range(12)])
    mean, covariance = pristine.mean(0), np.cov(pristine, rowvar=False) + 1e-4 * np.eye(36)
    return NiqeModel(mean=torch.tensor(mean), covariance=torch.tensor(covariance), window=torch.tensor(window()))


@pytest.mark.parametrize(("height", "width"), [(96, 192), (205, 310)])
def test_equal_to_the_second_computation(model: NiqeModel, height: int, width: int) -> None:
    luma = texture(100, height, width)
    found = features(luma)
    spread = np.linalg.pinv((model.covariance.numpy() + np.cov(found, rowvar=False)) / 2)
    difference = model.mean.numpy() - found.mean(0)
    assert niqe(torch.tensor(luma), model) == pytest.approx(np.sqrt(difference @ spread @ difference), rel=1e-6)


def test_worse_for_blurred_and_for_noisy_pictures_and_always_the_same(model: NiqeModel) -> None:
    luma = texture(200)
    clean = niqe(torch.tensor(luma), model)
    noisy = np.clip(luma + np.random.default_rng(0).normal(0, 20, luma.shape), 0, 255)
    assert clean == niqe(torch.tensor(luma), model)
    assert clean is not None
    for spoilt in (gaussian_filter(luma, 2), noisy):
        worse = niqe(torch.tensor(spoilt), model)
        assert worse is not None
        assert worse > 1.5 * clean


def test_flat_blocks_are_passed_over_and_rounding_noise_does_not_matter(model: NiqeModel) -> None:
    luma = torch.tensor(texture(300))
    luma[:, 150:] = 77.0
    value = niqe(luma, model)
    assert value is not None
    nudged = NiqeModel(mean=model.mean, covariance=model.covariance, window=model.window * (1 - 1e-14))
    assert niqe(luma, nudged) == pytest.approx(value, rel=1e-9)


def test_too_small_and_textureless_pictures_have_none(model: NiqeModel) -> None:
    assert niqe(torch.tensor(texture(1, 96, 191)), model) is None
    assert niqe(torch.full((192, 192), 50.0), model) is None


def test_strips_do_not_change_the_figure_and_bound_what_is_in_memory(
    model: NiqeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    luma = torch.tensor(texture(400, 500, 210))
    whole = niqe(luma, model)
    asked: list[int] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return luma[start:stop]

    monkeypatch.setattr(module, "_STRIP_PIXELS", 96 * 192)
    assert module.niqe_of_rows(rows, luma.shape, model) == pytest.approx(whole, rel=1e-12)
    assert max(asked) == 96 + 2 * 22, "one row of blocks, 3 rows of the window at half size, 16 of the margin"


def test_parameters_from_a_file(tmp_path: Path, model: NiqeModel) -> None:
    path = tmp_path / "params.npz"
    fields: dict[str, Any] = {"cov_pris_param": model.covariance.numpy(), "gaussian_window": model.window.numpy()}
    np.savez(path, mu_pris_param=model.mean.numpy()[None], **fields)
    read = read_niqe_model(path)
    assert torch.equal(read.mean, model.mean)
    assert torch.equal(read.covariance, model.covariance)
    np.savez(path, mu_pris_param=np.zeros(5), **fields)
    with pytest.raises(DataError, match=r"36 means.*\(5,\)"):
        read_niqe_model(path)
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read"):
        read_niqe_model(path)
