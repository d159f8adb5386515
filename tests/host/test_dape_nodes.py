"""The tagger's nodes: what they read, how often they look, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seesr_core.dape import tagger_input

from ..dape_nets import CONFIG, LITE, lite_dape, tiny_dape
from .locate import plugin
from .nets import NANO

NAMES = tuple(f"tag {number}" for number in range(CONFIG.num_tags))
CHINESE = tuple(f"标签{number}" for number in range(CONFIG.num_tags))


def vocabulary() -> Any:
    """Words of the tiny tagger, of which it finds the first ones."""
    thresholds = torch.linspace(0.1, 0.9, len(NAMES))
    return plugin("seesr_core.dape").Vocabulary(tags=NAMES, tags_zh=CHINESE, thresholds=thresholds)


def network() -> Any:
    """The tiny tagger, of the plugin's own classes."""
    dape = plugin("seesr_core.dape")
    return dape.DAPE.from_state_dict(tiny_dape().state_dict(), dape.DAPEConfig.from_dict(CONFIG.to_dict()))


@pytest.fixture
def dape() -> Any:
    """The tagger behind the host's memory management."""
    return plugin("nodes.host.dape").wrap_dape(network(), vocabulary(), device=torch.device("cpu"), name="tiny")


@pytest.fixture
def looks(dape: Any) -> list[Tensor]:
    """Everything that the network is given."""
    seen: list[Tensor] = []
    dape.patcher.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


def photos(count: int = 1, height: int = 30, width: int = 40, seed: int = 0) -> Tensor:
    """IMAGE."""
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def tags(dape: Any, image: Tensor, **options: Any) -> list[str]:
    """What SeeSR Extract Tags gives."""
    given = {"threshold": 1.0, "exclude": "", "language": "en", **options}
    return plugin("nodes.prompts").SeeSRExtractTags.execute(dape, image, **given).result[0]


def soft_prompt(dape: Any, image: Tensor) -> Tensor:
    """What SeeSR Soft Prompt gives."""
    return plugin("nodes.prompts").SeeSRSoftPrompt.execute(dape, image).result[0]


def test_both_prompts_are_those_of_the_core(dape: Any) -> None:
    image = photos(2)
    prepare = plugin("seesr_core.dape").tagger_input
    with torch.no_grad():  # photo by photo as the node does: another batch rounds differently
        seen = [network()(prepare(photo[None].movedim(-1, 1), CONFIG.image_size)) for photo in image]
    tokens, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
    expected = vocabulary().prompt_tags(logits)
    assert tags(dape, image) == expected
    assert any(expected)
    torch.testing.assert_close(soft_prompt(dape, image), tokens, atol=1e-6, rtol=1e-5)


def test_both_prompts_and_places_of_a_tagger_with_efficientnet() -> None:
    core = plugin("seesr_core.dape")
    net = core.DAPE.from_state_dict(lite_dape().state_dict(), core.DAPEConfig.from_dict(LITE.to_dict()))
    dape = plugin("nodes.host.dape").wrap_dape(net, vocabulary(), device=torch.device("cpu"), name="lite")
    image = photos()
    with torch.no_grad():
        tokens, logits = lite_dape()(tagger_input(image.movedim(-1, 1), LITE.image_size))
    torch.testing.assert_close(soft_prompt(dape, image), tokens, atol=1e-5, rtol=1e-4)
    assert tags(dape, image) == vocabulary().prompt_tags(logits) != [""]
    found = dape.ground(image, vocabulary().select(logits)[0])
    assert found.shape[1:] == (30, 40)
    assert found.amax() > 0.9


def test_every_photo_is_looked_at_once(dape: Any, looks: list[Tensor]) -> None:
    image = photos(2)
    tags(dape, image)
    soft_prompt(dape, image)
    tags(dape, image.clone(), threshold=0.5)
    soft_prompt(dape, image[1:])
    assert len(looks) == 2
    tags(dape, image + 0.01)
    assert len(looks) == 4


def test_reading_with_and_without_antialiasing_are_kept_apart(dape: Any, looks: list[Tensor]) -> None:
    large = photos(height=200, width=300)
    filtered, plain = (dape.read(large, antialias=antialias).tokens_BLD for antialias in (True, False))
    assert len(looks) == 2
    assert not torch.equal(filtered, plain)
    assert torch.equal(dape.read(large, antialias=False).tokens_BLD, plain)


def test_pictures_of_the_same_numbers_but_other_sides_are_told_apart(dape: Any) -> None:
    image = photos(height=30, width=40)
    turned = image.reshape(1, 40, 30, 3)
    assert not torch.equal(soft_prompt(dape, image), soft_prompt(dape, turned))


def test_old_readings_are_forgotten(dape: Any, looks: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin("nodes.host.dape"), "_REMEMBERED", 2)
    a, b, c = photos(3, height=8, width=8).split(1)
    for image in (a, b, a, c, a, b):
        soft_prompt(dape, image)
    # b was the oldest when c came, a had been used again.
    assert len(looks) == 4


def test_a_batch_gives_what_its_photos_give_alone(dape: Any) -> None:
    image = photos(3)
    alone = [
        soft_prompt(plugin("nodes.host.dape").wrap_dape(network(), vocabulary(), device=torch.device("cpu")), i[None])
        for i in image
    ]
    assert torch.equal(soft_prompt(dape, image), torch.cat(alone))


def test_result_lies_on_the_cpu_in_single_precision(dape: Any) -> None:
    dape.patcher.model.double()
    reading = dape.read(photos())
    assert {part.dtype for part in reading} == {torch.float32}
    assert {part.device.type for part in reading} == {"cpu"}


def test_alpha_is_left_out(dape: Any) -> None:
    image = photos()
    with_alpha = torch.cat([image, torch.zeros_like(image[..., :1])], dim=-1)
    assert torch.equal(soft_prompt(dape, with_alpha), soft_prompt(dape, image))


def test_excluded_words_and_languages(dape: Any) -> None:
    image = photos()
    english = tags(dape, image)[0].split(", ")
    chinese = tags(dape, image, language="zh")[0].split(", ")
    assert [NAMES.index(name) for name in english] == [CHINESE.index(name) for name in chinese]
    unwanted = f" {english[0].upper()} ， {chinese[1]},, "
    assert tags(dape, image, exclude=unwanted)[0].split(", ") == english[2:]


def test_threshold_scales_every_tag(dape: Any) -> None:
    image = photos()
    counts = [len(tags(dape, image, threshold=factor)[0].split(", ")) for factor in (0.0, 1.0)]
    assert counts[0] == len(NAMES) > counts[1]


def test_no_tag_is_an_empty_line_and_a_note(dape: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert tags(dape, photos(2), threshold=10.0) == ["", ""]
    assert "expected at least one tag for every picture, found none in picture 0, 1" in caplog.text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("cat, sofa", "at night", "clean, 8k"), "cat, sofa, at night,clean, 8k"),
        (("cat", "", "clean"), "cat, ,clean"),
        (("", "at night", "clean"), "at night,clean"),
        ((" ", "", "clean"), "clean"),
        (("", "", ""), ""),
    ],
)
def test_prompt_in_the_published_order(given: tuple[str, str, str], expected: str) -> None:
    assert plugin("nodes.prompts").SeeSRPrompt.execute(*given).result == (expected,)


def test_host_finds_the_weights(dape: Any) -> None:
    import comfy.model_management

    soft_prompt(dape, photos())
    (patcher,) = dape.get_models()
    assert any(loaded is patcher for loaded in comfy.model_management.loaded_models())
    assert patcher.model_size() == sum(p.numel() * p.element_size() for p in patcher.model.parameters())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(0, 8, 8, 3), "The IMAGE is empty"),
        (torch.zeros(1, 8, 8, 1), "Expected an IMAGE"),
        (torch.full((1, 8, 8, 3), float("nan")), "no numbers"),
        (torch.full((1, 8, 8, 3), float("inf")), "no numbers"),
    ],
)
def test_what_is_no_photo_is_refused(dape: Any, looks: list[Tensor], image: Tensor, message: str) -> None:
    with pytest.raises(plugin("seesr_core.errors").ImageError, match=message):
        tags(dape, image)
    assert not looks


def test_tagger_that_gives_nan_is_refused_and_not_remembered(dape: Any, looks: list[Tensor]) -> None:
    with torch.no_grad():
        dape.patcher.model.fc.bias.fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(plugin("seesr_core.errors").SettingsError, match="tiny holds values that are no numbers"):
            soft_prompt(dape, photos())
    assert len(looks) == 2


def test_shipped_tagger_is_loaded() -> None:
    host_dape = plugin("nodes.host.dape").load_dape(NANO / "dape" / "dape-nano.safetensors")
    reading = host_dape.read(photos())
    assert reading.tokens_BLD.shape == (1, host_dape.config.tokens, host_dape.config.token_width)
    assert reading.logits_BN.shape == (1, len(host_dape.vocabulary))


def publish(folder: Path) -> Path:
    """RAM's file as published, with DAPE's adapter and the tag lists beside it."""
    state = {key.replace("tagging_head", "vision_multi"): value for key, value in network().state_dict().items()}
    computed = {"visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(16, 9, 9)}
    torch.save({"model": {**state, **computed}}, folder / "ram.pth")
    layer = "tagging_head.encoder.layer.0.crossattention.self.key"
    torch.save({f"{layer}.lora_A": torch.ones(2, 20), f"{layer}.lora_B": torch.ones(24, 2)}, folder / "DAPE.pth")
    lists = {"": NAMES, "_threshold": ["0.5"] * len(NAMES), "_chinese": CHINESE}
    for suffix, lines in lists.items():
        (folder / f"ram_tag_list{suffix}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["ram.pth", "DAPE.pth"])
def test_published_files_find_each_other(tmp_path: Path, name: str) -> None:
    host_dape = plugin("nodes.host.dape").load_dape(publish(tmp_path) / name)
    assert host_dape.vocabulary.tags == NAMES
    merged = host_dape.patcher.model.state_dict()["tagging_head.encoder.layer.0.crossattention.self.key.weight"]
    plain = network().state_dict()["tagging_head.encoder.layer.0.crossattention.self.key.weight"]
    assert not torch.equal(merged, plain)


@pytest.mark.parametrize(
    ("absent", "message"), [("DAPE.pth", "has no DAPE adapter"), ("ram_tag_list.txt", "has no tag list")]
)
def test_published_files_name_the_missing_one(tmp_path: Path, absent: str, message: str) -> None:
    (publish(tmp_path) / absent).unlink()
    with pytest.raises(plugin("seesr_core.errors").WeightsError, match=message):
        plugin("nodes.host.dape").load_dape(tmp_path / "ram.pth")


@pytest.mark.parametrize("name", ["SeeSRExtractTags", "SeeSRPrompt", "SeeSRSoftPrompt"])
def test_every_input_has_a_tooltip(name: str) -> None:
    schema = getattr(plugin("nodes.prompts"), name).define_schema()
    assert all(entry.tooltip for entry in schema.inputs)
    assert json.dumps([entry.as_dict() for entry in schema.inputs])
