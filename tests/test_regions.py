"""Masks per tag and the attention bias they become, against a plain softmax written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seesr_core.errors import SettingsError
from seesr_core.method.regions import (
    FLOOR,
    Regions,
    attention_bias,
    check_masks,
    fit_masks,
    guidance_share,
    number_tokens,
    tag_spans,
)
from seesr_core.tiling.grid import Tile

from .dape_nets import seeded


def words(text: str) -> int:
    """A tokenizer of whole words and commas."""
    return len(text.replace(",", " , ").split())


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("cat, dog", ["cat", "dog"]),
        ("cat,dog , ,", ["cat", "dog"]),
        ("cat (small, grey), dog", ["cat (small, grey)", "dog"]),
        ("(cat, (a, b):1.2), dog [x, y]", ["(cat, (a, b):1.2)", "dog [x, y]"]),
        ("猫，狗", ["猫", "狗"]),
        ("cat), dog", ["cat)", "dog"]),
        ("", []),
    ],
)
def test_tags_are_parted_by_commas_outside_brackets(text: str, tags: list[str]) -> None:
    assert [text[start:end] for start, end in tag_spans(text)] == tags


def test_every_token_knows_its_tag() -> None:
    text = "grey cat, dog, nice,clean"
    assert number_tokens(text, tag_spans("grey cat, dog"), words) == [1, 1, 0, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
def test_the_bias_multiplies_attention_by_the_mask_before_it_is_normalised(strength: float) -> None:
    q, k = (torch.randn(1, n, 8, generator=seeded(n), dtype=torch.float64) for n in (6, 4))
    mask = torch.rand(1, 2, 2, 3, generator=seeded()).double()
    mask[0, 0, 0, 0] = 0.0
    numbers = torch.tensor([[0, 1, 1, 2]])
    bias = attention_bias(mask, numbers, strength).double()
    weights = (q @ k.mT / 8**0.5).exp()
    cells = mask.flatten(2)[0].clamp_min(FLOOR) ** strength
    weights = weights * torch.stack([torch.ones(6), cells[0], cells[0], cells[1]], -1)
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close((q @ k.mT / 8**0.5 + bias).softmax(-1), expected, rtol=1e-5, atol=1e-6)


def test_a_cell_of_no_mask_sees_the_common_words_only() -> None:
    bias = attention_bias(torch.zeros(1, 1, 1, 1), torch.tensor([[0, 1, 0]]), 1.0)
    shares = bias.softmax(-1)[0, 0]
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.5]), rtol=0, atol=1e-6)


def test_neutral_regions_do_not_act() -> None:
    masks, numbers = torch.rand(1, 1, 4, 4, generator=seeded()), torch.tensor([[0, 1]])
    assert Regions(masks=masks, numbers=numbers).acts
    assert not Regions(masks=masks, numbers=numbers, strength=0.0).acts
    assert not Regions(masks=torch.ones_like(masks), numbers=numbers).acts
    assert not Regions(masks=masks, numbers=torch.zeros_like(numbers)).acts


def test_tiles_and_the_negative_half_keep_the_order_of_the_batch() -> None:
    masks = torch.rand(2, 1, 4, 6, generator=seeded())
    regions = Regions(masks=masks, numbers=torch.tensor([[0, 1], [1, 0]]))
    tiles = [Tile(0, 0, 4, 4), Tile(0, 2, 4, 4)]
    cropped = regions.crop(tiles)
    assert torch.equal(cropped.masks, torch.cat([masks[..., :4], masks[..., 2:]]))
    assert cropped.numbers.tolist() == [[0, 1], [1, 0]] * 2
    both = cropped.beside(4)
    assert torch.equal(both.bias(4, 4)[:4], torch.zeros(4, 16, 2))
    torch.testing.assert_close(both.bias(4, 4)[4, :, 1], masks[0, 0, :, :4].flatten().log())


def test_a_smaller_feature_map_gets_the_mean_of_its_cells() -> None:
    masks = torch.rand(1, 1, 4, 8, generator=seeded())
    bias = Regions(masks=masks, numbers=torch.tensor([[1]])).bias(2, 4)
    torch.testing.assert_close(bias[0, :, 0], F.avg_pool2d(masks, 2).flatten().log())


def test_masks_of_any_size_are_stretched_over_the_latent() -> None:
    mask = torch.zeros(1, 64, 32)
    mask[:, :32] = 1
    fitted = fit_masks(mask, 8, 8)
    assert torch.equal(fitted[0, :4], torch.ones(4, 8))
    assert torch.equal(fitted[0, 4:], torch.zeros(4, 8))
    for size in ((3, 5), (7, 9), (100, 40), (100, 7)):
        assert torch.equal(fit_masks(torch.ones(2, 10, 33), *size), torch.ones(2, *size))


def test_guidance_share_takes_the_largest_mask_and_lifts_the_outside() -> None:
    masks = torch.zeros(2, 8, 8)
    masks[0, :, :2], masks[1, :, :2], masks[1, :, 6:] = 1.0, 0.3, 0.5
    share = guidance_share(masks, 8, 8, outside=0.2, feather=0)[0, 0]
    torch.testing.assert_close(share[0], torch.tensor([1.0, 1, 0.2, 0.2, 0.2, 0.2, 0.6, 0.6]))
    soft = guidance_share(masks, 8, 8, outside=0.0, feather=2.0)[0, 0]
    assert ((soft[:, 2] > 0) & (soft[:, 2] < soft[:, 1])).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 4, 4, 3), "number, height, width"),
        (torch.ones(0, 4, 4), "number, height, width"),
        (torch.full((1, 4, 4), float("nan")), "no numbers"),
        (torch.tensor([[[0.0, 255.0]]]), "found 0 to 255"),
        (torch.tensor([[[-1.0, 0.0]]]), "found -1 to 0"),
    ],
)
def test_what_is_no_mask_is_named(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_masks(mask)


def test_masks_come_alone_or_with_a_channel() -> None:
    assert check_masks(torch.ones(4, 5)).shape == (1, 4, 5)
    assert check_masks(torch.ones(2, 1, 4, 5)).shape == (2, 4, 5)
