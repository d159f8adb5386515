"""The whole degradation: shapes, determinism, options, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from seesr_core.errors import DataError, SettingsError
from trainer.degradation import (
    BlurConfig,
    DegradationConfig,
    FinalSincConfig,
    GeneratorDraws,
    Pair,
    SharpenConfig,
    StageConfig,
    degrade,
    draw_kernels,
)
from trainer.degradation.ops import quantize, resize, sharpen

from .test_degradation_ops import photo

CONFIG = DegradationConfig(sharpen=SharpenConfig(fast=True))


def degraded(seed: int, batch: int = 2, side: tuple[int, int] = (64, 64), config: DegradationConfig = CONFIG) -> Pair:
    return degrade(photo(batch, *side), config, GeneratorDraws(torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("side", [(64, 64), (75, 61), (32, 97)])
@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_and_ranges(batch: int, side: tuple[int, int]) -> None:
    for seed in range(4):
        pair = degraded(seed, batch, side)
        assert pair.lr.shape == (batch, 3, side[0] // 4, side[1] // 4)
        assert pair.hr_usm.shape == pair.lr_upsampled.shape == (batch, 3, *side)
        for image in (pair.lr, pair.hr_usm):
            assert image.isfinite().all()
            assert image.min() >= 0
            assert image.max() <= 1


def test_the_smallest_photo_passes_and_a_smaller_one_is_refused() -> None:
    side = CONFIG.min_side
    for seed in range(8):
        assert degraded(seed, 1, (side, side)).lr.isfinite().all()
    with pytest.raises(DataError, match=rf"at least {side} pixels.*\(1, 3, {side - 1}, {side}\)"):
        degraded(0, 1, (side - 1, side))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 64, 64, 3)])
def test_other_layouts_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"\(B, 3, H, W\)"):
        degrade(torch.rand(shape), CONFIG, GeneratorDraws(torch.Generator()))


def test_integer_photos_are_refused() -> None:
    with pytest.raises(DataError, match=r"float photos.*torch\.uint8"):
        degrade(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), CONFIG, GeneratorDraws(torch.Generator()))


def test_one_seed_gives_one_result_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = degraded(5), degraded(5), degraded(6)
    assert torch.equal(first.lr, again.lr)
    assert not torch.equal(first.lr, other.lr)
    assert torch.equal(state, torch.get_rng_state())


def test_a_generator_s_state_resumes_the_sequence() -> None:
    x, generator = photo(2, 48, 48), torch.Generator().manual_seed(1)
    degrade(x, CONFIG, GeneratorDraws(generator))
    state = generator.get_state()
    expected = degrade(x, CONFIG, GeneratorDraws(generator))
    resumed = torch.Generator()
    resumed.set_state(state)
    assert torch.equal(degrade(x, CONFIG, GeneratorDraws(resumed)).lr, expected.lr)


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    """With Gaussian noise nothing that is drawn depends on the pixels, so another neighbour changes nothing."""
    gaussian = replace(
        CONFIG,
        first=replace(CONFIG.first, gaussian_probability=1.0),
        second=replace(CONFIG.second, gaussian_probability=1.0),
    )
    x = photo(3, 48, 48)
    changed = torch.cat([x[:2], photo(1, 48, 48, seed=9)])
    one, two = (degrade(batch, gaussian, GeneratorDraws(torch.Generator().manual_seed(3))) for batch in (x, changed))
    torch.testing.assert_close(one.lr[:2], two.lr[:2])
    assert not torch.equal(one.lr[2], two.lr[2])


def test_given_kernels_are_the_ones_that_would_have_been_drawn() -> None:
    x, generator = photo(2, 48, 48), torch.Generator().manual_seed(4)
    draws = GeneratorDraws(generator)
    kernels = draw_kernels(2, CONFIG, draws)
    given = degrade(x, CONFIG, draws, kernels)
    drawn = degrade(x, CONFIG, GeneratorDraws(torch.Generator().manual_seed(4)))
    assert torch.equal(given.lr, drawn.lr)


def test_quantised_results_are_the_rounded_ones() -> None:
    plain, rounded = degraded(7), degraded(7, config=replace(CONFIG, quantize=True))
    for name in ("lr", "hr_usm", "lr_upsampled"):
        assert torch.equal(getattr(rounded, name), quantize(getattr(plain, name)))
    assert torch.equal(plain.lr_upsampled, resize(plain.lr, "bicubic", size=(64, 64)))


def test_clean_images_are_only_shrunk() -> None:
    pair = degraded(8, config=replace(CONFIG, clean_probability=1.0))
    hr_usm = sharpen(photo(2, 64, 64), CONFIG.sharpen)
    assert torch.equal(pair.hr_usm, hr_usm)
    torch.testing.assert_close(pair.lr, resize(hr_usm, "area", size=(16, 16)))


def test_a_harmless_configuration_is_an_ordinary_resize() -> None:
    """Delta kernels, kept sizes, no noise and the best JPEG leave only the resize to LR size."""
    stage = StageConfig(
        blur=BlurConfig(sigma=(1e-3, 1e-3), sinc_probability=0.0),
        resize_weights=(0.0, 0.0, 1.0),
        gaussian_probability=1.0,
        gaussian_sigma=(0.0, 0.0),
        jpeg_quality=(99.9, 99.9),
    )
    config = DegradationConfig(
        first=stage,
        second=stage,
        final_sinc=FinalSincConfig(probability=0.0),
        resize_modes=("area",),
        sharpen=SharpenConfig(weight=0.0),
    )
    gray = photo(2, 64, 64).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    lr = degrade(gray, config, GeneratorDraws(torch.Generator().manual_seed(0))).lr
    torch.testing.assert_close(lr, resize(gray, "area", size=(16, 16)), atol=0.01, rtol=0)


def test_weighted_choices_come_as_often_as_their_weights() -> None:
    draws = GeneratorDraws(torch.Generator().manual_seed(0))
    picks = [draws.choice(("up", "down", "keep"), (0.2, 0.7, 0.1)) for _ in range(2000)]
    shares = [picks.count(option) / 2000 for option in ("up", "down", "keep")]
    assert shares == pytest.approx([0.2, 0.7, 0.1], abs=0.03)
    even = [draws.choice((1, 2)) for _ in range(500)]
    assert even.count(1) / 500 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageConfig(gray_probability=1.5), "gray_probability must be a probability from 0 to 1, found 1.5"),
        (lambda: StageConfig(resize_weights=(0.0, 0.0, 0.0)), "resize_weights must be 3 weights"),
        (lambda: StageConfig(resize_range=(1.1, 1.5)), "resize_range must be a range with 1 in it"),
        (lambda: StageConfig(jpeg_quality=(30.0, 100.0)), "jpeg_quality must be below 100"),
        (lambda: StageConfig(gaussian_sigma=(30.0, 1.0)), r"gaussian_sigma must be a \(low, high\) pair"),
        (lambda: BlurConfig(sizes=(8,)), "kernel sizes must be a list of odd sides"),
        (lambda: BlurConfig(sigma=(0.0, 3.0)), "sigma must be above 0"),
        (
            lambda: BlurConfig(families=cast(Any, ("round",)), family_weights=(1.0,)),
            r"kernel families must be among .*\['round'\]",
        ),
        (lambda: BlurConfig(plateau_beta=(1.5, 2.0)), "plateau_beta must be a range with 1 in it"),
        (lambda: SharpenConfig(radius=0), "sharpen radius must be at least 1 pixel, found 0"),
        (lambda: FinalSincConfig(probability=-0.1), "final sinc probability must be a probability"),
        (
            lambda: DegradationConfig(kernel_canvas=19),
            r"kernel_canvas must be odd and at least the largest kernel \(21\)",
        ),
        (lambda: DegradationConfig(resize_modes=cast(Any, ("nearest",))), r"resize_modes must be among area"),
        (lambda: DegradationConfig(scale=0), "scale must be at least 1, found 0"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()
