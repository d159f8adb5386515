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


@pytest.mark.parametrize("photo_count", [1, 2])
def test_transparency_is_enlarged_beside_the_colours(photo_count: int) -> None:
    """As the command line does it; the networks' picture has colours only."""
    lr, alpha = photos(photo_count), photos(photo_count, seed=7)[..., :1]
    reference = prepared(torch.cat([lr, alpha], dim=-1))
    assert torch.equal(reference, prepared(lr))
    decoded = reference if photo_count == 2 else torch.cat([reference, 1 - reference])
    found = finished(decoded, reference, torch.cat([lr, alpha], dim=-1))
    assert torch.equal(found[..., :3], finished(decoded, reference, lr))
    for picture, mask in zip(found, alpha.expand(2, -1, -1, -1), strict=True):
        expected = Image.fromarray((mask[..., 0] * 255).round().byte().numpy()).resize(
            (164, 120), Image.Resampling.BICUBIC
        )
        assert np.array_equal((picture[..., 3] * 255).round().byte().numpy(), np.asarray(expected))


def test_another_scale_than_prepared_is_told_before_the_picture_is_asked_for(caplog: Any) -> None:
    node, lr = plugin("nodes.image").SeeSRFinishImage, photos(1, 200, 200)
    assert node.check_lazy_status(prepared(lr), lr, 4.0, image=None, color_fix="adain") == ["image"]
    assert "reduces" not in caplog.text
    with pytest.raises(plugin("seesr_core.errors").ImageError, match=r"too few .* Set the same scale"):
        node.check_lazy_status(prepared(lr, 2.0), lr, 4.0, image=None, color_fix="adain")
    node.check_lazy_status(prepared(lr, 4.0), lr, 2.0, image=None, color_fix="adain")
    assert "reduces the result from 800×800 to 400×400" in caplog.text


def test_values_beyond_the_range() -> None:
    lr = photos()
    reference = prepared(lr)
    assert torch.equal(prepared(3 * lr - 1), prepared((3 * lr - 1).clamp(0, 1)))
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
        ({"image": torch.zeros(0, 120, 160, 3)}, "The IMAGE is empty"),
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
