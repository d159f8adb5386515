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
from trainer.nano.classes import class_words, membership, word_probabilities
from trainer.nano.recipe import NANO_RECIPES
from trainer.nano.tagger import TaggerTask, check_start, class_embeddings, frequent_words, tagger_config

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
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
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


def test_classes_are_said_in_words_of_their_kinds() -> None:
    words = class_words()
    assert len(words) == 1000
    for number in (281, 283, 284, 285):  # tabby, Persian, Siamese and Egyptian cat
        assert {"cat", "animal", "mammal"} <= set(words[number])
    assert {"motorcycle", "vehicle"} <= set(words[665])  # moped
    assert {"coffee", "cup", "drink"} <= set(words[967])  # espresso
    assert {"cat", "dog"} & set(words[151]) == {"dog"}  # Chihuahua
    assert sum(not found for found in words) < 100


def test_a_word_is_as_likely_as_all_its_classes_together() -> None:
    known = membership(("cat", "dog", "animal", "nonsense"))
    assert known.shape == (1000, 4)
    assert known[:, 3].sum() == 0
    logits = torch.full((1, 1000), -50.0)
    logits[0, [281, 285, 151]] = torch.tensor([0.3, 0.5, 0.2]).log()
    torch.testing.assert_close(word_probabilities(logits, known), torch.tensor([[0.8, 0.2, 1.0, 0.0]]))


def test_like_words_begin_alike() -> None:
    weight = torch.randn(1000, 32, generator=seeded(3))
    weight[281:286] += 4 * torch.randn(32, generator=seeded(4))
    found = class_embeddings(weight, membership(("cat", "tabby", "moped", "nonsense")), 8)
    assert found.shape == (4, 8)
    torch.testing.assert_close(found[:3].std(), torch.tensor(1.0))
    assert not found[3].any()
    alike = torch.nn.functional.cosine_similarity(found[0], found[1:3])
    assert alike[0] > 0.8 > alike[1]


WORDS = ("a", "animal", "b", "c", "cat", "d", "moped")


def pretrained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TaggerTask:
    """A task on a photo of its own word "a", before a network that is sure of an Egyptian cat."""
    network = EfficientNetLite0()
    network.initialize(seeded(1))
    torch.nn.init.zeros_(network._fc.weight)
    network._fc.bias.data = torch.full((1000,), -20.0).index_fill(0, torch.tensor(285), 0.0)
    monkeypatch.setattr("trainer.nano.tagger.load_efficientnet", lambda: network.requires_grad_(False))
    Image.new("RGB", (64, 64), (160, 120, 80)).save(folder / "p.png")
    config = replace(NANO_RECIPES["debug"]().tagger, pretrained=True, words_at_once=2)
    photos = [Photo(path=folder / "p.png", tags=("a",))]
    assert {"a", "cat", "moped"} <= set(frequent_words(photos, 1, classes=True))
    return TaggerTask(config, photos, WORDS)


def test_it_is_told_what_the_network_sees_and_the_photo_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = pretrained(tmp_path, monkeypatch)
    with torch.no_grad():
        labels = task._labels([0], task.tagger.visual_encoder(task._crop(0, seeded(0))[None])[:, 0])
    torch.testing.assert_close(labels, torch.tensor([[0.9, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]]), atol=1e-4, rtol=0)
    truth = task.truth([Photo(path=tmp_path / "p.png", tags=("b",))], WORDS)
    assert truth.tolist() == [[0, 1, 1, 0, 1, 0, 0]]
    asked = task._asked(labels, seeded(0))
    assert asked.words[:3].tolist() == [0, 1, 4]
    assert len(asked.words) == 5
    assert asked.weights.tolist() == [1, 1, 1, 2, 2]


def test_an_absent_word_is_wrong_only_where_a_class_stands_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = pretrained(tmp_path, monkeypatch)
    logits, labels = torch.full((1, 7), -3.5), torch.zeros(1, 7)
    losses = task._by_word(logits, labels, torch.arange(7))
    assert (losses[0, [1, 4, 6]] > 0.02).all()  # sigmoid(-3.5) is 0.03: within the margin of the others
    assert not losses[0, [0, 2, 3, 5]].any()
    loss, _ = task.loss(0)
    loss.backward()
    learns = {name.split(".")[0] for name, p in task.tagger.named_parameters() if p.grad is not None}
    assert learns == {"image_proj", "label_embed", "wordvec_proj", "tagging_head", "fc"}


def test_imagined_classes_are_seen_where_photos_show_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = pretrained(tmp_path, monkeypatch)
    torch.nn.init.normal_(task.classes.weight, generator=seeded(2))
    torch.nn.init.zeros_(task.classes.bias)
    features = torch.full((64, 5, 1280), 3.0)
    seen = task._imagined(features, [seeded(i) for i in range(64)])
    changed = (seen != features).any(2)
    assert 0.3 < changed[:, 0].float().mean() < 0.7  # half of them, and their mean with them
    torch.testing.assert_close(seen[:, 0], seen[:, 1:].mean(1))
    rise = (task.classes(seen[:, 0]) - task.classes(features[:, 0])).amax(1)[changed[:, 0]]
    assert rise.min() > 2.5
    assert rise.max() < 13.5
    task.config.imagined = 0.0
    assert torch.equal(task._imagined(features, [seeded(i) for i in range(64)]), features)
