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
from trainer.deep_features import EfficientNetLite0
from trainer.nano.recipe import NANO_RECIPES
from trainer.nano.tagger import TaggerTask, check_start, tagger_config

from .dape_nets import seeded, tiny_dape


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


def task(folder: Path, start: DAPE | None = None, **changes: Any) -> TaggerTask:
    Image.new("RGB", (64, 64), (160, 120, 80)).save(folder / "p.png")
    config = replace(NANO_RECIPES["debug"]().tagger, **changes)
    return TaggerTask(config, [Photo(path=folder / "p.png", tags=tuple("abcde"))], list("abcde"), start)


def test_the_encoder_starts_as_it_was_trained_on_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = EfficientNetLite0()
    monkeypatch.setattr("trainer.nano.tagger.load_efficientnet", lambda: network)
    encoder = task(tmp_path, pretrained=True).tagger.visual_encoder
    assert len(encoder.state_dict()) > 90
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    fresh = task(tmp_path).tagger.visual_encoder.get_parameter("_conv_head.weight")
    assert not torch.equal(fresh, network.get_parameter("_conv_head.weight"))


def test_it_goes_on_from_another_tagger_at_any_size(tmp_path: Path) -> None:
    start = tagger(128)
    found = task(tmp_path, start).tagger
    assert found.config.image_size == 64
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_another_net_or_vocabulary_is_refused() -> None:
    config = tagger_config(5)
    for other in (replace(config, num_tags=6), replace(config, label_width=64)):
        with pytest.raises(SettingsError, match="start afresh"):
            check_start(DAPE(other), config)
    with pytest.raises(SettingsError, match="has a Swin encoder"):
        check_start(tiny_dape(), config)
