"""From a photo to the tagger's input."""

from __future__ import annotations

import pytest
import torch

from seesr_core.dape import tagger_input
from seesr_core.dape.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize
from seesr_core.errors import ImageError

from .dape_nets import seeded


def test_flat_colour_becomes_its_normalised_value() -> None:
    colour = torch.tensor([0.2, 0.5, 0.9])
    x = tagger_input(colour.view(1, 3, 1, 1).expand(1, 3, 10, 20), 8)
    expected = (colour - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(x, expected.view(1, 3, 1, 1).expand(1, 3, 8, 8), rtol=0, atol=1e-5)


def test_right_size_is_only_normalised() -> None:
    image = torch.rand(2, 3, 16, 16, generator=seeded())
    torch.testing.assert_close(tagger_input(image, 16), normalize(image), rtol=0, atol=1e-6)


def test_antialiasing_suppresses_detail_finer_than_the_result() -> None:
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    smooth, aliased = tagger_input(stripes, 15), tagger_input(stripes, 15, antialias=False)
    assert smooth[..., 2:-2].std(dim=-1).max() < 0.2 * aliased[..., 2:-2].std(dim=-1).max()


def test_bicubic_overshoot_is_clamped() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    low, high = (normalize(torch.full((1, 3, 1, 1), value)) for value in (0.0, 1.0))
    x = tagger_input(edge, 32, mode="bicubic", antialias=False)
    assert torch.equal(x.amin(dim=(2, 3), keepdim=True), low)
    assert torch.equal(x.amax(dim=(2, 3), keepdim=True), high)


def test_dtype_is_kept() -> None:
    assert tagger_input(torch.rand(1, 3, 9, 9, generator=seeded()).bfloat16(), 6).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_other_tensors_are_refused(image: torch.Tensor) -> None:
    with pytest.raises(ImageError, match=r"\(B, 3, H, W\)"):
        tagger_input(image, 8)
