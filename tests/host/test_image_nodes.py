"""Preparing and finishing in the host's layout: the core's numbers, sizes, batches, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from .locate import plugin


def photos(count: int = 1, height: int = 30, width: int = 41, seed: int = 0) -> Tensor:
    """IMAGE on 8-bit levels, as Load Image gives it."""
    levels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    return torch.from_numpy(levels).float() / 255


def pil(image_HWC: Tensor) -> Image.Image:
    """An IMAGE's picture."""
    return Image.fromarray((image_HWC * 255).round().to(torch.uint8).numpy())


def prepared(image: Tensor, scale: float = 4.0, min_size: int = 64) -> Tensor:
    """What SeeSR Prepare Image gives."""
    return plugin("nodes.image").SeeSRPrepareImage.execute(image, scale, min_size).result[0]


def finished(image: Tensor, reference: Tensor, lr: Tensor, scale: float = 4.0, color_fix: str = "adain") -> Tensor:
    """What SeeSR Finish Image gives."""
    return plugin("nodes.image").SeeSRFinishImage.execute(image, reference, lr, scale, color_fix).result[0]


def test_prepare_is_the_core_s() -> None:
    image = photos(2)
    expected = [plugin("seesr_core.pictures.sizes").prepare(pil(photo), scale=3.3, min_size=128) for photo in image]
    found = prepared(image, 3.3, 128)
    assert found.dtype == torch.float32
    assert [pil(picture).tobytes() for picture in found] == [picture.tobytes() for picture in expected]


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
def test_finish_is_the_core_s(color_fix: str) -> None:
    lr = photos(2)
    reference = prepared(lr)
    # A decoder's values are not on 8-bit levels.
    decoded = torch.rand(reference.shape, generator=torch.Generator().manual_seed(1))
    expected = [
        plugin("seesr_core.pictures.sizes").finish(pil(a), pil(b), lr_size=(41, 30), scale=4.0, color_fix=color_fix)
        for a, b in zip(decoded, reference, strict=True)
    ]
    found = finished(decoded, reference, lr, color_fix=color_fix)
    assert [pil(picture).tobytes() for picture in found] == [picture.tobytes() for picture in expected]


@pytest.mark.parametrize(
    ("height", "width", "scale", "expected"),
    [(30, 41, 4.0, (120, 164)), (33, 27, 2.5, (82, 68)), (64, 7, 1.0, (64, 7)), (100, 90, 0.5, (50, 45))],
)
def test_result_has_exactly_the_photo_s_size_times_scale(
    height: int, width: int, scale: float, expected: tuple[int, int]
) -> None:
    lr = photos(height=height, width=width)
    reference = prepared(lr, scale, 64)
    assert reference.shape[1] % 8 == reference.shape[2] % 8 == 0
    assert finished(reference, reference, lr, scale).shape == (1, *expected, 3)


def test_one_photo_serves_many_results() -> None:
    lr = photos()
    reference = prepared(lr)
    decoded = torch.cat([reference, 1 - reference])
    both = finished(decoded, reference, lr)
    assert torch.equal(both[1:], finished(decoded[1:], reference, lr))


def test_alpha_and_values_beyond_the_range() -> None:
    lr = photos()
    reference = prepared(lr)
    with_alpha = torch.cat([3 * lr - 1, torch.zeros_like(lr[..., :1])], dim=-1)
    assert torch.equal(prepared(with_alpha), prepared((3 * lr - 1).clamp(0, 1)))
    assert finished(3 * reference - 1, reference, lr, color_fix="none").max() <= 1


NAN = torch.full((1, 120, 160, 3), float("nan"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": NAN}, "decoded picture holds values that are no numbers"),
        ({"reference": NAN}, "prepared picture holds values that are no numbers"),
        ({"reference": photos(1, 120, 168)}, "160×120 pixels and the prepared one 168×120"),
        ({"reference": photos(3, 120, 160)}, "prepared holds 3 pictures for 2"),
        ({"lr": photos(3)}, "lr_image holds 3 pictures for 2"),
        ({"lr": torch.zeros(2, 30, 41)}, "Expected an IMAGE"),
        ({"image": torch.zeros(0, 120, 160, 3)}, "Expected an IMAGE"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict[str, Any], message: str) -> None:
    lr = photos(2, 30, 40)
    given = {"image": photos(2, 120, 160), "reference": prepared(lr), "lr": lr, **changes}
    with pytest.raises(plugin("seesr_core.errors").ImageError, match=message):
        finished(**given)


@pytest.mark.parametrize("image", [NAN, torch.zeros(0, 8, 8, 3), torch.zeros(1, 8, 8)])
def test_what_is_no_photo_is_not_prepared(image: Tensor) -> None:
    with pytest.raises(plugin("seesr_core.errors").ImageError):
        prepared(image)


@pytest.mark.parametrize(("scale", "min_size"), [(0.0, 512), (65.0, 512), (4.0, -1)])
def test_numbers_out_of_range_are_refused(scale: float, min_size: int) -> None:
    with pytest.raises(plugin("seesr_core.errors").SettingsError):
        prepared(photos(), scale, min_size)
