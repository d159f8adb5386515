"""Colour fix: adain and wavelet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seesr_core.errors import ImageError, SettingsError
from seesr_core.method.color import adain, color_fix, wavelet, wavelet_low

from .golden import golden_dir
from .parity.groups import color_fix as parity


def picture(seed: int, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_parity():
    comparisons = list(parity.cases(golden_dir(), full=False))
    assert comparisons
    assert [comparison.line() for comparison in comparisons if not comparison.ok] == []


def test_adain_takes_mean_and_deviation_and_keeps_the_pattern():
    image, reference = picture(0), picture(1) * 0.3 + 0.1
    fixed = adain(image, reference)
    torch.testing.assert_close(fixed.mean((-2, -1)), reference.mean((-2, -1)))
    torch.testing.assert_close(fixed.std((-2, -1)), reference.std((-2, -1)), atol=1e-3, rtol=1e-3)
    pattern = (image[0, 0].flatten(), fixed[0, 0].flatten())
    assert torch.corrcoef(torch.stack(pattern))[0, 1] == pytest.approx(1.0, abs=1e-5)


def dilated_blurs(x: Tensor) -> Tensor:
    """The low band by its definition: 3 × 3 kernels [1 2 1]ᵀ[1 2 1] / 16, dilated."""
    line = torch.tensor([1.0, 2.0, 1.0])
    kernel = (torch.outer(line, line) / 16)[None, None].repeat(x.shape[1], 1, 1, 1)
    for radius in (1, 2, 4, 8, 16):
        x = F.conv2d(F.pad(x, (radius,) * 4, mode="replicate"), kernel, dilation=radius, groups=x.shape[1])
    return x


@pytest.mark.parametrize(("height", "width"), [(24, 40), (8, 8), (1, 5)])
def test_wavelet_joins_own_detail_and_the_references_colours(height, width):
    image, reference = picture(0, height, width), picture(1, height, width)
    torch.testing.assert_close(wavelet_low(image), dilated_blurs(image))
    expected = image - dilated_blurs(image) + dilated_blurs(reference)
    torch.testing.assert_close(wavelet(image, reference), expected)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_channels_are_independent_and_inputs_untouched(method):
    image, reference = picture(0), picture(1)
    before = image.clone(), reference.clone()
    fixed = color_fix(image, reference, method)
    channels = [color_fix(image[:, c : c + 1], reference[:, c : c + 1], method) for c in range(3)]
    assert torch.equal(fixed, torch.cat(channels, dim=1))
    assert torch.equal(image, before[0])
    assert torch.equal(reference, before[1])


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_a_picture_fixed_against_itself_stays(method):
    torch.testing.assert_close(color_fix(picture(0), picture(0), method), picture(0))


def test_none_leaves_the_picture():
    image = picture(0)
    assert color_fix(image, picture(1), "none") is image


def test_bad_input():
    with pytest.raises(SettingsError, match="choose one of adain, wavelet, none"):
        color_fix(picture(0), picture(1), "ycbcr")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"expected .*24, 40.* found .*24, 48"):
        color_fix(picture(0), picture(1, 24, 48))
