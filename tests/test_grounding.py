"""Where the tagger sees a tag: windows, maps, the head's own attention, wrong plugs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seesr_core.dape import Tag, ground
from seesr_core.dape.grounding import METHODS, WINDOWS, Method, enlarge, ground_tokens, windows
from seesr_core.errors import ImageError, SettingsError

from .dape_nets import CONFIG, images, seeded, tiny_dape

SIDE = 6


def tokens(seed: int = 3) -> Tensor:
    return torch.randn(1, CONFIG.tokens, CONFIG.token_width, generator=seeded(seed))


def test_shares_are_the_attention_that_the_head_computes() -> None:
    """Against the head's fused attention: shares times values, through the layer's own output."""
    dape = tiny_dape()
    given, places = tokens(), [4, 1]
    shares = dape.tag_attention(given, places)
    assert shares.shape == (2, 1, 4, 2, CONFIG.tokens)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 1, 4, 2))
    core: Any = dape.tagging_head.get_submodule("encoder.layer.0.crossattention.self")
    queries = torch.relu(dape.wordvec_proj(dape.label_embed[places]))[None]
    values = core.value(given).unflatten(-1, (4, -1)).transpose(1, 2)
    torch.testing.assert_close(
        (shares[0] @ values).transpose(1, 2).flatten(2), core(queries, given), rtol=1e-4, atol=1e-5
    )


def test_some_tags_have_the_logits_that_they_have_among_all() -> None:
    dape, given = tiny_dape(), tokens()
    torch.testing.assert_close(dape.tag_logits(given, [7, 0]), dape.tag_logits(given)[:, [7, 0]])


def test_a_window_holds_its_tokens_and_their_mean() -> None:
    grid = torch.arange(16.0).reshape(16, 1)
    first, *_, last = windows(grid, 3)[..., 0]
    assert sorted(first[1:].tolist()) == [0, 0, 0, 0, 1, 1, 4, 4, 5]
    assert sorted(last[1:].tolist()) == [10, 11, 11, 14, 14, 15, 15, 15, 15]
    assert first[0] == first[1:].mean()


def test_maps_are_the_logits_of_windows_above_their_mean() -> None:
    dape, given, tag = tiny_dape(), tokens(), 5
    evidence = torch.zeros(SIDE * SIDE)
    for size in WINDOWS:
        for place, window in enumerate(windows(given[0, 1:], size)):
            evidence[place] += dape.tag_logits(window[None])[0, tag].detach() / len(WINDOWS)
    risen = (evidence - evidence.mean()).clamp_min(0)
    found = ground_tokens(dape, given, [tag])[0]
    torch.testing.assert_close(found, (risen / risen.max()).reshape(SIDE, SIDE), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_a_photo_have_its_size_and_reach_from_0_to_1(method: Method) -> None:
    photo = torch.rand(1, 3, 30, 50, generator=seeded())
    maps = ground(tiny_dape(), photo, [Tag("x", 0.9, 2), 7], method=method)
    assert maps.shape == (2, 30, 50)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    assert 0.9 < maps.max() <= 1
    assert torch.equal(maps, ground(tiny_dape(), photo[0], [2, 7], method=method))


def test_a_photo_without_any_difference_is_grounded_everywhere() -> None:
    dape = tiny_dape()
    same = tokens()[:, :1].expand(-1, CONFIG.tokens, -1)
    assert torch.equal(ground_tokens(dape, same, [1]), torch.ones(1, SIDE, SIDE))


def test_no_tags_give_no_maps() -> None:
    assert ground(tiny_dape(), torch.rand(3, 20, 30), []).shape == (0, 20, 30)
    assert enlarge(torch.zeros(0, 6, 6), 4, 5).shape == (0, 4, 5)


def test_wrong_plugs_are_named() -> None:
    dape = tiny_dape()
    with pytest.raises(ImageError, match="one photo"):
        ground(dape, images(2), [1])
    with pytest.raises(SettingsError, match=r"tags 0 to 10; found \[11\]"):
        ground(dape, torch.rand(3, 20, 30), [11])
    with pytest.raises(SettingsError, match="the tagger that read the photo"):
        ground_tokens(dape, torch.zeros(1, 5, CONFIG.token_width), [1])
    with pytest.raises(SettingsError, match="Unknown method"):
        ground_tokens(dape, tokens(), [1], method="guess")  # type: ignore[arg-type]


def test_asking_for_maps_changes_nothing_else() -> None:
    dape, x = tiny_dape(), images(1)
    before = dape(x)
    ground(dape, torch.rand(3, 20, 30), [1, 2])
    after = dape(x)
    assert torch.equal(before.tokens_BLD, after.tokens_BLD)
    assert torch.equal(before.logits_BN, after.logits_BN)
