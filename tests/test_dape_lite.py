"""EfficientNet-Lite0 as the tagger's encoder: what it looks at, its tokens, configuration, files and grounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seesr_core.dape import DAPE, DAPEConfig, LiteConfig, Vocabulary, ground
from seesr_core.dape.efficientnet import LiteEncoder, levels
from seesr_core.dape.preprocess import denormalize, normalize
from seesr_core.errors import ImageError, SettingsError, WeightsError
from seesr_core.formats.detect import Kind, detect
from seesr_core.formats.ram import read_dape, read_ram, write_dape
from seesr_core.install.inspection import inspect_file
from trainer.deep_features import EfficientNetLite0
from trainer.engine.frozen import keep_frozen

from .dape_nets import CONFIG, LITE, images, lite_dape, seeded, tiny_dape

VOCABULARY = Vocabulary(tags=tuple(f"tag {i}" for i in range(11)), thresholds=torch.full((11,), 0.5))


def saved(folder: Path) -> Path:
    path = folder / "dape-small.safetensors"
    write_dape(path, lite_dape(), VOCABULARY, dtype=torch.float32)
    return path


def lite_encoder() -> LiteEncoder:
    encoder = lite_dape().visual_encoder
    assert isinstance(encoder, LiteEncoder)
    return encoder


def test_the_network_looks_at_the_levels_of_its_own_training() -> None:
    rgb = torch.tensor([0.0, 64.0, 127.0, 255.0]).div(255).expand(1, 3, 1, 4)
    found = levels(denormalize(normalize(rgb)))
    expected = torch.tensor([-127.0, -63.0, 0.0, 128.0]).div(128).expand(1, 3, 1, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)


def test_tokens_are_the_last_map_of_the_published_network_with_their_mean_in_front() -> None:
    dape, rgb = lite_dape(), torch.rand(2, 3, 64, 64, generator=seeded())
    published = EfficientNetLite0()
    weights = dape.visual_encoder.state_dict()
    lost = published.load_state_dict(weights, strict=False)
    assert sorted(lost.missing_keys) == ["_fc.bias", "_fc.weight"]
    assert not lost.unexpected_keys
    tokens = dape.visual_encoder(normalize(rgb))
    assert tokens.shape == (2, 1 + 2 * 2, 1280)
    assert torch.equal(tokens[:, 0], tokens[:, 1:].mean(1))
    logits = torch.nn.functional.linear(tokens[:, 0], published._fc.weight, published._fc.bias)
    torch.testing.assert_close(logits, published(rgb), rtol=1e-4, atol=1e-4)
    assert 0 <= tokens.min() < 6 >= tokens.max() > tokens.min()


def test_tokens_lie_row_by_row() -> None:
    encoder, x = lite_encoder(), images(1, 64)
    places = encoder.last_map(levels(denormalize(x)))
    assert torch.equal(encoder(x)[0, 1:], torch.stack([places[0, :, i // 2, i % 2] for i in range(4)]))


def test_half_precision_keeps_the_levels() -> None:
    seen = []
    encoder = lite_encoder()
    encoder._conv_stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = images(1, 64)
    encoder(x)
    encoder.half()(x.half())
    assert seen[1].dtype == torch.float16
    torch.testing.assert_close(seen[1].float(), seen[0], rtol=1e-3, atol=1e-3)


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ImageError, match=r"\(B, 3, 64, 64\); found \(2, 3, 48, 48\)"):
        lite_dape()(images())
    for size in (0, 16, 250):
        with pytest.raises(SettingsError, match=f"multiple of 32 pixels; found {size}"):
            LiteConfig(image_size=size)


def test_fresh_weights_come_from_the_generator_and_keep_the_size_of_signals() -> None:
    first, second, other = (DAPE(LITE) for _ in range(3))
    for dape, seed in ((first, 1), (second, 1), (other, 2)):
        dape.initialize(seeded(seed))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    drawn = [name for name, p in first.named_parameters() if p.ndim > 1]
    assert not any(torch.equal(first.get_parameter(name), other.get_parameter(name)) for name in drawn)
    tokens = first.visual_encoder(images(2, 64))
    assert 0.1 < tokens.std() < 3
    assert (tokens[0] - tokens[1]).std() > 0.1 * tokens.std()


def test_configuration_survives_json_and_swin_is_written_as_before() -> None:
    assert DAPEConfig.from_dict(json.loads(json.dumps(LITE.to_dict()))) == LITE
    assert list(LITE.to_dict()) == ["head", "num_tags", "label_width", "lite"]
    assert (LITE.image_size, LITE.grid, LITE.tokens, LITE.encoder.width) == (64, 2, 5, 1280)
    assert json.dumps(CONFIG.to_dict()) == (
        '{"swin": {"image_size": 48, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], '
        '"window": 3, "mlp_ratio": 4.0, "final_norm": true, "drop_path": 0.1}, "head": {"hidden": 24, "heads": 4, '
        '"layers": 2, "intermediate": 40, "encoder_width": 20, "dropout": 0.1}, "num_tags": 11, "label_width": 12}'
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"head": {}}, "names neither"),
        ({"swin": {}, "lite": {}, "head": {}}, "names both"),
        ({"lite": {"image_size": 100}, "head": {}}, "multiple of 32"),
        ({"lite": {"image_size": 1 << 20}, "head": {}}, "from 32 to 2048"),
        ({"lite": {"width": 3}, "head": {}}, "unknown entry 'width'"),
        ({"lite": 1, "head": {}}, "cannot be read"),
    ],
)
def test_unreadable_configurations_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DAPEConfig.from_dict(data)


def test_the_encoder_is_told_by_its_keys() -> None:
    state = lite_dape().state_dict()
    assert DAPEConfig.from_state_dict(state, image_size=64) == LITE
    assert DAPEConfig.from_state_dict(state).image_size == 256
    del state["visual_encoder._conv_stem.weight"]
    with pytest.raises(WeightsError, match=r"visual_encoder\._conv_stem…' were expected and none was found"):
        DAPEConfig.from_state_dict(state)


def test_files_are_detected_inspected_written_and_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = inspect_file(path)
    assert found.label == "a DAPE file of this project (EfficientNet-Lite0, 11 tags)"
    assert found.fits == "a SeeSR file for soft prompts of width 20"
    assert found.metadata["image_size"] == "64"
    dape, vocabulary = read_dape(path)
    assert dape.config == LITE
    assert vocabulary.tags == VOCABULARY.tags
    assert torch.equal(dape(images(1, 64)).logits_BN, lite_dape()(images(1, 64)).logits_BN)
    torch.save({"model": lite_dape().state_dict()}, tmp_path / "plain.pth")
    assert detect(tmp_path / "plain.pth").kind is Kind.RAM
    assert detect(tmp_path / "plain.pth").label == "a small tagger (EfficientNet-Lite0, 11 tags)"
    assert inspect_file(tmp_path / "plain.pth").fits.startswith("its adapter of stage 1 and the tag lists")
    assert read_ram(tmp_path / "plain.pth").config.image_size == 256


@pytest.mark.parametrize("key", ["_blocks.3._depthwise_conv.bias", "_conv_stem.weight"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path)
    with safe_open(path, "pt") as handle:
        fields = handle.metadata()
    tensors = load_file(path)
    del tensors[f"visual_encoder.{key}"]
    save_file(tensors, path, fields)
    with pytest.raises(
        WeightsError, match=rf"dape-small\.safetensors: .*1 keys are missing \['visual_encoder\.{key}'\]"
    ) as caught:
        read_dape(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("weights", "config"), [(lite_dape, CONFIG), (tiny_dape, LITE)])
def test_weights_of_one_encoder_with_the_configuration_of_the_other(
    weights: Callable[[], DAPE], config: DAPEConfig
) -> None:
    with pytest.raises(WeightsError, match=r"do not fit: \d+ keys are missing .* and \d+ are left over"):
        DAPE.from_state_dict(weights().state_dict(), config)


def test_tags_are_grounded_on_its_grid() -> None:
    maps = ground(lite_dape(), torch.rand(1, 3, 30, 50, generator=seeded()), [2, 7])
    assert maps.shape == (2, 30, 50)
    assert 0 <= maps.min() < 0.5 < maps.max() <= 1


def test_size_of_the_small_encoder() -> None:
    with torch.device("meta"):
        encoder = LiteEncoder(LiteConfig())
    assert 3.3e6 < sum(parameter.numel() for parameter in encoder.parameters()) < 3.5e6


def test_frozen_weights_are_kept_in_fewer_bits() -> None:
    dape, x = lite_dape().requires_grad_(False), images(1, 64)
    before = dape(x).tokens_BLD
    keep_frozen(dape, "bf16")
    kept = sum(p.numel() for p in dape.visual_encoder.parameters() if p.dtype == torch.bfloat16)
    assert kept > 0.9 * sum(p.numel() for p in dape.visual_encoder.parameters())
    assert 0 < (dape(x).tokens_BLD - before).norm() < 0.02 * before.norm()
