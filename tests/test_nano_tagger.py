"""The small tagger: what its training makes of a photo, and that it goes on from another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from seesr_core.dape import DAPE
from seesr_core.dape.preprocess import normalize
from seesr_core.errors import SettingsError
from trainer.data.photos import Photo
from trainer.nano.recipe import NANO_RECIPES
from trainer.nano.tagger import TaggerTask, resized, tagger_config

from .dape_nets import seeded


def tagger(size: int) -> DAPE:
    model = DAPE(tagger_config(5, size))
    model.initialize(seeded(0))
    return model.eval()


def colours(folder: Path, **changes: Any) -> Tensor:
    """The colour of one evenly coloured photo in forty views of it in training (40, 3)."""
    Image.new("RGB", (64, 64), (160, 120, 80)).save(folder / "p.png")
    config = replace(NANO_RECIPES["debug"]().tagger, **changes)
    task = TaggerTask(config, [Photo(path=folder / "p.png", tags=("a",))], ["a"])
    zero, one = (normalize(torch.full((1, 3, 1, 1), value)).flatten() for value in (0.0, 1.0))
    views = torch.stack([task._crop(0, seeded(i)) for i in range(40)])
    torch.testing.assert_close(views.amin((2, 3)), views.amax((2, 3)))
    return (views[:, :, 0, 0] - zero) / (one - zero)


def test_colours_stay_without_jitter_and_change_places_with_channel_shuffle(tmp_path: Path) -> None:
    plain = colours(tmp_path, jitter=0.0, channel_shuffle=0.0)
    torch.testing.assert_close(plain, torch.tensor([160.0, 120.0, 80.0]).div(255).expand(40, 3))
    shuffled = colours(tmp_path, jitter=0.0, channel_shuffle=1.0)
    torch.testing.assert_close(shuffled.sort(1, descending=True).values, plain)
    assert len({tuple(order) for order in shuffled.argsort(1).tolist()}) == 6
    some = colours(tmp_path, jitter=0.0, channel_shuffle=0.5)
    assert 5 <= sum(torch.allclose(some[i], plain[i]) for i in range(40)) < 38


def test_jitter_changes_colours_within_its_bounds(tmp_path: Path) -> None:
    jittered = colours(tmp_path, jitter=0.2, channel_shuffle=0.0)
    brightness = jittered.mean(1) / (120 / 255)
    assert 0.8 <= brightness.min() < 0.85
    assert 1.15 < brightness.max() <= 1.2
    # Contrast and saturation both stretch the distance between the channels.
    spread = (jittered[:, 0] - jittered[:, 2]) / (80 / 255) / brightness
    assert 0.8**2 <= spread.min() < 0.8
    assert 1.2 < spread.max() <= 1.2**2


def test_at_the_same_size_nothing_changes() -> None:
    model = tagger(64)
    state = resized(model, model.config)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())


def test_at_another_size_only_position_biases_change_and_keep_centre_and_corners() -> None:
    old = tagger(128)
    new = DAPE(tagger_config(5, 192))
    new.load_state_dict(resized(old, new.config))
    biases = 0
    for name, tensor in old.state_dict().items():
        if not name.endswith("relative_position_bias_table"):
            assert torch.equal(tensor, new.state_dict()[name])
            continue
        biases += 1
        before, after = (
            table.T.unflatten(1, (side, side)) for table, side in ((tensor, 7), (new.state_dict()[name], 11))
        )
        for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            torch.testing.assert_close(after[:, row, column], before[:, row, column])
        torch.testing.assert_close(after[:, 5, 5], before[:, 3, 3])
    assert biases == 5


def test_another_size_of_net_or_vocabulary_is_refused() -> None:
    model = tagger(64)
    for config in (replace(model.config, num_tags=6), replace(model.config, label_width=64)):
        with pytest.raises(SettingsError, match="start afresh"):
            resized(model, config)
