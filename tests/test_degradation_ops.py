"""The single operations of the degradation on their own."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kornia.filters import filter2d
from PIL import Image
from torch import Tensor

from trainer.degradation import GeneratorDraws, SharpenConfig, ops
from trainer.degradation.jpeg import jpeg, quality_to_step
from trainer.degradation.kernels import delta_kernel, gaussian_kernel, sinc_kernel
from trainer.degradation.noise import gaussian_noise, poisson_noise
from trainer.degradation.ops import blur, photon_levels, quantize, reflect_pad, resize, sharpen


def photo(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth colour blobs with gray texture, (batch, 3, height, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (smooth + 0.05 * torch.randn(batch, 1, height, width, generator=generator)).clamp(0, 1)


def draws(seed: int = 0) -> GeneratorDraws:
    return GeneratorDraws(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 4), (30, 17)])
def test_reflection_repeats_like_numpy(size: tuple[int, int]) -> None:
    x = photo(2, *size)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (10, 10), (10, 10)), mode="reflect")
    assert torch.equal(reflect_pad(x, 10), torch.from_numpy(expected))


def test_blur_uses_each_image_s_own_kernel() -> None:
    x = photo(2, 24, 31)
    kernels = torch.stack([gaussian_kernel(9, 2.0, 1.0, 0.4), delta_kernel(9)]).float()
    blurred = blur(x, kernels)
    torch.testing.assert_close(blurred[:1], blur(x[:1], kernels[:1]))
    torch.testing.assert_close(blurred[1], x[1])
    assert (blurred[0] - x[0]).abs().mean() > 0.01


def test_blur_gives_kornia_the_one_layout_that_all_its_versions_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels last, as photos are decoded: kornia 0.8, the newest for Python 3.10, cannot view it otherwise."""
    x, kernel = (
        torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(0)).movedim(-1, 1),
        gaussian_kernel(5, 1.0, 1.0)[None],
    )
    expected, layouts = blur(x.contiguous(), kernel), []

    def spy(padded: Tensor, kernels: Tensor, padding: str) -> Tensor:
        layouts.append(padded.is_contiguous())
        return filter2d(padded, kernels, padding=padding)

    monkeypatch.setattr(ops, "filter2d", spy)
    assert torch.equal(blur(x, kernel), expected)
    assert layouts == [True]


def test_blur_is_a_weighted_sum_of_neighbours() -> None:
    x, kernel = photo(1, 16, 16), sinc_kernel(5, 2.0).float()
    expected = (x[0, 1, 6:11, 3:8] * kernel).sum()
    torch.testing.assert_close(blur(x, kernel[None])[0, 1, 8, 5], expected)


def test_sharpening_leaves_flat_areas_and_weak_texture_alone() -> None:
    step = torch.full((1, 3, 80, 160), 0.3)
    step[..., 80:] = 0.7
    texture = step + 0.02 * torch.sin(torch.arange(160.0))
    sharp = sharpen(texture, SharpenConfig())
    far, near = sharp[..., 3], sharp[..., 81]
    torch.testing.assert_close(far, texture[..., 3], atol=1e-6, rtol=0)
    assert (near - texture[..., 81]).min() > 0.03


def test_fast_sharpening_is_the_same_up_to_decisions_on_the_threshold() -> None:
    x = photo(2, 60, 44)
    exact, fast = sharpen(x, SharpenConfig()), sharpen(x, SharpenConfig(fast=True))
    assert (exact - x).abs().max() > 0.02
    assert (exact - fast).abs().max() < 5e-4


def test_no_weight_sharpens_nothing() -> None:
    x = photo(1, 20, 20)
    torch.testing.assert_close(sharpen(x, SharpenConfig(weight=0.0, radius=9)), x)


def test_resize_by_scale_rounds_the_size_down() -> None:
    assert resize(photo(1, 50, 33), "area", scale=0.37).shape == (1, 3, 18, 12)
    assert resize(photo(1, 50, 33), "bicubic", size=(7, 70)).shape == (1, 3, 7, 70)


@pytest.mark.parametrize("noise", [gaussian_noise, poisson_noise])
def test_noise_is_gray_only_where_it_should_be(noise: Callable[..., Tensor]) -> None:
    x = photo(3, 32, 32)
    added = noise(x, torch.tensor([10.0, 10.0, 10.0]), torch.tensor([False, True, False]), draws())
    assert torch.equal(added[1, 0], added[1, 2])
    assert not torch.equal(added[0, 0], added[0, 2])
    assert not torch.equal(added[2, 0], added[2, 2])


def test_gaussian_noise_has_the_standard_deviation_asked_for() -> None:
    added = gaussian_noise(torch.zeros(2, 3, 64, 64), torch.tensor([5.0, 25.0]), torch.zeros(2).bool(), draws())
    assert (added.std((1, 2, 3)) * 255).tolist() == pytest.approx([5.0, 25.0], rel=0.05)


def test_poisson_noise_grows_with_brightness_and_scale() -> None:
    x = torch.linspace(0, 1, 256).repeat(2, 3, 64, 1)
    added = poisson_noise(x, torch.tensor([1.0, 3.0]), torch.zeros(2).bool(), draws())
    deviation = added.std((1, 2))
    # 256 levels stand for 256 photons: shot noise of sqrt(256 x) / 256 at brightness x.
    assert deviation[0, 64:192].mean().item() == pytest.approx(
        0.0625 * x[0, 0, 0, 64:192].sqrt().mean().item(), rel=0.05
    )
    assert (deviation[1] / deviation[0].clamp_min(1e-9))[64:].mean().item() == pytest.approx(3.0, rel=0.1)
    assert (added[..., 0] == 0).all()


def test_photons_are_the_levels_raised_to_a_power_of_two() -> None:
    for levels in range(1, 257):
        image = (torch.arange(512) % levels / 255).view(1, 1, 16, 32)
        assert photon_levels(image).item() == 2 ** (levels - 1).bit_length()


def test_quantising_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([-0.1, 0.5 / 255, 1.5 / 255, 2.4 / 255, 1.2])
    assert (quantize(x) * 255).tolist() == pytest.approx([0.0, 0.0, 2.0, 2.0, 255.0])


def pillow_jpeg(x_3HW: Tensor, quality: int) -> Tensor:
    """What Pillow's encoder and decoder make of an image of whole 8-bit levels."""
    stream = io.BytesIO()
    pixels = (x_3HW.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=2)
    return torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("quality", [25, 50])
def test_jpeg_of_a_gray_photo_is_a_real_encoder_s_of_the_transposed_photo(quality: int) -> None:
    """The published luma table is transposed. Only gray photos agree, since real decoders interpolate the chroma, and
    only at qualities where libjpeg has no steps to round."""
    x = quantize(photo(1, 64, 80).mean(1, keepdim=True)).expand(-1, 3, -1, -1)
    real = pillow_jpeg(x[0].mT, quality).mT
    difference = (jpeg(x, torch.tensor([float(quality)]))[0] - real).abs() * 255
    assert (x[0] - real).abs().mean() * 255 > 3
    assert difference.mean() < 0.5


def test_jpeg_takes_a_quality_per_image_and_any_size() -> None:
    x = photo(3, 37, 21)
    together = jpeg(x, torch.tensor([30.0, 60.0, 95.0]))
    assert together.shape == x.shape
    for index, quality in enumerate((30.0, 60.0, 95.0)):
        alone = jpeg(x[index : index + 1], torch.tensor([quality]))
        torch.testing.assert_close(together[index : index + 1], alone)
    assert together.min() >= 0
    assert together.max() <= 1


def test_quality_sets_the_step_by_libjpeg_s_rule() -> None:
    steps = quality_to_step(torch.tensor([10.0, 30.0, 50.0, 95.0], dtype=torch.float64))
    assert steps.tolist() == pytest.approx([5.0, 5 / 3, 1.0, 0.1])
