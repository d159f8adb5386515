"""Blur kernels: what they are as filters, and how often each kind is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.degradation import BlurConfig, DegradationConfig, FinalSincConfig, GeneratorDraws, draw_kernels
from trainer.degradation.kernels import (
    _bessel_j1,
    delta_kernel,
    gaussian_kernel,
    generalized_kernel,
    pad_kernel,
    plateau_kernel,
    sinc_kernel,
)
from trainer.degradation.random_kernels import draw_blur_kernel, draw_final_kernel

EXAMPLES = {
    "gaussian": gaussian_kernel(15, 2.5, 0.8, 0.6),
    "generalized": generalized_kernel(17, 2.2, 1.1, -1.1, 2.5),
    "plateau": plateau_kernel(19, 2.9, 0.5, 2.2, 1.2),
    "sinc": sinc_kernel(13, 2.5),
    "delta": delta_kernel(7),
}


def draws(seed: int = 0) -> GeneratorDraws:
    return GeneratorDraws(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EXAMPLES)
def test_sums_to_one_and_is_point_symmetric(name: str) -> None:
    kernel = EXAMPLES[name]
    assert kernel.dtype == torch.float64
    torch.testing.assert_close(kernel.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(kernel, kernel.flip(0, 1))


def test_gaussian_has_the_variance_asked_for_along_its_axes() -> None:
    kernel, axis = gaussian_kernel(41, 3.0, 1.5), torch.arange(-20, 21, dtype=torch.float64)
    variance_x = (kernel.sum(0) * axis**2).sum().item()
    variance_y = (kernel.sum(1) * axis**2).sum().item()
    assert (variance_x, variance_y) == pytest.approx((9.0, 2.25), rel=1e-3)


def test_rotation_turns_the_first_axis_from_columns_towards_rows() -> None:
    torch.testing.assert_close(gaussian_kernel(15, 3.0, 1.0, math.pi / 2), gaussian_kernel(15, 1.0, 3.0))
    turned = gaussian_kernel(15, 3.0, 1.0, math.pi / 4)
    assert turned[10, 10] > 2 * turned[10, 4]


def test_beta_one_is_the_plain_gaussian() -> None:
    torch.testing.assert_close(generalized_kernel(13, 2.0, 1.0, 0.3, 1.0), gaussian_kernel(13, 2.0, 1.0, 0.3))


def test_sinc_passes_below_its_cutoff_and_stops_above() -> None:
    cutoff = math.pi / 2
    kernel, axis = sinc_kernel(101, cutoff), torch.arange(-50, 51, dtype=torch.float64)
    gain = [(kernel.sum(0) * torch.cos(share * cutoff * axis)).sum().item() for share in (0.5, 1.5)]
    assert gain == pytest.approx([1.0, 0.0], abs=0.05)


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.0), (1.0, 0.4400505857449335), (20.0, 0.06683312417584991)])
def test_bessel_has_the_tabulated_values(x: float, expected: float) -> None:
    assert _bessel_j1(torch.tensor([x, 60.0], dtype=torch.float64))[0].item() == pytest.approx(expected, abs=1e-14)
    assert _bessel_j1(torch.tensor([x], dtype=torch.float64))[0].item() == pytest.approx(expected, abs=1e-14)


def test_padding_keeps_the_kernel_in_the_centre() -> None:
    kernel = sinc_kernel(7, 2.0)
    padded = pad_kernel(kernel, 21)
    assert torch.equal(padded[7:14, 7:14], kernel)
    assert torch.count_nonzero(padded) == torch.count_nonzero(kernel)


def test_every_image_gets_three_kernels_of_its_own() -> None:
    kernels = draw_kernels(5, DegradationConfig(), draws())
    for stack in (kernels.first, kernels.second, kernels.final):
        assert stack.shape == (5, 21, 21)
        assert stack.dtype == torch.float32
        torch.testing.assert_close(stack.sum((1, 2)), torch.ones(5))
    assert len({tuple(kernel.flatten().tolist()) for kernel in kernels.first}) == 5


def is_sinc(kernel: Tensor) -> bool:
    return bool(kernel.min() < 0)


def test_kinds_and_sizes_come_as_often_as_configured() -> None:
    source, config = draws(1), BlurConfig()
    kernels = [draw_blur_kernel(config, source) for _ in range(1000)]
    assert sum(map(is_sinc, kernels)) / 1000 == pytest.approx(0.1, abs=0.03)
    assert {len(kernel) for kernel in kernels} == set(config.sizes)
    finals = [draw_final_kernel(FinalSincConfig(), source) for _ in range(1000)]
    assert sum(len(kernel) == 1 for kernel in finals) / 1000 == pytest.approx(0.2, abs=0.04)


def test_families_without_weight_are_never_drawn() -> None:
    config = BlurConfig(family_weights=(1.0, 0, 0, 0, 0, 0), sinc_probability=0.0)
    source = draws(2)
    for _ in range(50):
        kernel = draw_blur_kernel(config, source)
        torch.testing.assert_close(kernel, kernel.T)


def test_plateau_with_the_published_range_has_beta_one_half_of_the_time() -> None:
    config = BlurConfig(
        sizes=(7,), family_weights=(0, 0, 0, 0, 1.0, 0), sinc_probability=0.0, sigma=(1.0, 1.0), plateau_beta=(1.0, 2.0)
    )
    source, flat = draws(3), plateau_kernel(7, 1.0, 1.0, 0.0, 1.0)
    hits = sum(torch.equal(draw_blur_kernel(config, source), flat) for _ in range(400))
    assert hits / 400 == pytest.approx(0.5, abs=0.1)
