"""The small tagger goes on from another one, also with larger images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seesr_core.dape import DAPE
from seesr_core.errors import SettingsError
from trainer.nano.tagger import resized, tagger_config

from .dape_nets import seeded


def tagger(size: int) -> DAPE:
    model = DAPE(tagger_config(5, size))
    model.initialize(seeded(0))
    return model.eval()


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
