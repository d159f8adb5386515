"""Taggers in and out: the published RAM and DAPE files, our own, and adapters of stage 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from seesr_core.dape import DAPE, Vocabulary, merge_published_lora
from seesr_core.dape.lora import published_lora_to_peft
from seesr_core.errors import SettingsError, WeightsError
from seesr_core.formats.ram import canonical_key, read_adapter, read_dape, read_ram, write_adapter, write_dape

from .checkpoint_files import normal, write_zeros
from .dape_nets import images, tiny_dape
from .golden import golden_dir
from .parity.weights import read_key_shapes

TAGS = (*(f"tag {i}" for i in range(10)), "Zürich")


def vocabulary(count: int = 11) -> Vocabulary:
    return Vocabulary(
        tags=TAGS[:count], tags_zh=tuple(f"标签{i}" for i in range(count)), thresholds=torch.linspace(0.4, 0.9, count)
    )


def adapter() -> dict[str, Tensor]:
    """An adapter of rank 2 in the published layout, for one fused and one plain layer, with ballast."""
    return {
        "visual_encoder.layers.0.blocks.1.attn.qkv.lora_A": normal(4, 16, seed=1),
        "visual_encoder.layers.0.blocks.1.attn.qkv.lora_B": normal(32, 2, seed=2),
        "tagging_head.encoder.layer.0.crossattention.self.key.lora_A": normal(2, 20, seed=3),
        "tagging_head.encoder.layer.0.crossattention.self.key.lora_B": normal(24, 2, seed=4),
        "text_decoder.bert.encoder.layer.0.attention.self.query.lora_A": normal(2, 8, seed=5),
        "text_decoder.bert.encoder.layer.0.attention.self.query.lora_B": torch.zeros(8, 2),
    }


def publish(path: Path, dape: DAPE, *, nested: bool = True) -> Path:
    """A RAM file as the authors save it: nested, the head under its old name, with text nets and computed buffers."""
    state = {key.replace("tagging_head", "vision_multi"): t for key, t in dape.state_dict().items()}
    ballast = {
        "tag_encoder.encoder.layer.0.crossattention.self.key.weight": torch.zeros(2, 2),
        "text_decoder.cls.predictions.bias": torch.zeros(3),
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
        "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(16, 9, 9),
    }
    torch.save({"model": {**state, **ballast}, "epoch": 3} if nested else {**state, **ballast}, path)
    return path


def assert_same_outputs(a: DAPE, b: DAPE) -> None:
    with torch.no_grad():
        found, expected = a(images()), b(images())
    assert torch.equal(found.tokens_BLD, expected.tokens_BLD)
    assert torch.equal(found.logits_BN, expected.logits_BN)


@pytest.mark.parametrize("nested", [True, False])
def test_published_ram(tmp_path: Path, nested: bool) -> None:
    dape = tiny_dape()
    assert_same_outputs(read_ram(publish(tmp_path / "ram.pth", dape, nested=nested)), dape)


def test_published_ram_with_adapter(tmp_path: Path) -> None:
    dape = tiny_dape()
    torch.save(adapter(), tmp_path / "DAPE.pth")
    found = read_ram(publish(tmp_path / "ram.pth", dape), tmp_path / "DAPE.pth")
    expected = merge_published_lora(dape.state_dict(), adapter(), scaling=1 / 8)
    assert_same_outputs(found, DAPE.from_state_dict(expected, dape.config))
    key = "visual_encoder.layers.0.blocks.1.attn.qkv.weight"
    assert not torch.equal(found.state_dict()[key], dape.state_dict()[key])


def test_keys_of_the_public_ram_file() -> None:
    keys = read_key_shapes(golden_dir() / "dape" / "swin_l_384_ram_pth_keys.json.gz")
    kept = {canonical_key(key) for key in keys} - {None}
    assert "label_embed" in kept
    assert "tagging_head.encoder.layer.1.crossattention.self.key.weight" in kept
    stems = {str(key).split(".")[0] for key in kept}
    assert stems == {"visual_encoder", "tagging_head", "label_embed", "wordvec_proj", "fc", "image_proj"}
    assert not any(str(key).endswith(("attn_mask", "relative_position_index")) for key in kept)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 1e-3)])
def test_our_file(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    dape = tiny_dape()
    write_dape(tmp_path / "dape.safetensors", dape, vocabulary(), source="RAM Swin-L + DAPE.pth", dtype=dtype)
    found, words = read_dape(tmp_path / "dape.safetensors")
    assert found.config == dape.config
    for key, tensor in dape.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], tensor, rtol=0, atol=tolerance)
    assert (words.tags, words.tags_zh) == (vocabulary().tags, vocabulary().tags_zh)
    assert torch.equal(words.thresholds, vocabulary().thresholds)


def test_metadata_of_our_file(tmp_path: Path) -> None:
    write_dape(tmp_path / "dape.safetensors", tiny_dape(), vocabulary(), source="test")
    with safe_open(tmp_path / "dape.safetensors", "pt") as handle:
        metadata = handle.metadata()
    assert metadata.keys() >= {"format", "version", "config", "tags", "tags_zh", "thresholds", "image_size", "source"}
    assert (metadata["format"], metadata["image_size"], metadata["source"]) == ("seesr-dape", "48", "test")
    assert json.loads(metadata["tags"])[-1] == "Zürich"


def test_half_precision_can_be_asked_for(tmp_path: Path) -> None:
    write_dape(tmp_path / "dape.safetensors", tiny_dape(), vocabulary())
    dape, _ = read_dape(tmp_path / "dape.safetensors", dtype=torch.float16)
    assert {t.dtype for t in dape.state_dict().values()} == {torch.float16}


def test_a_vocabulary_of_another_length_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="11 tags, the vocabulary 10"):
        write_dape(tmp_path / "dape.safetensors", tiny_dape(), vocabulary(10))
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_of_another_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "dape.safetensors"
    write_dape(path, tiny_dape(), vocabulary())
    with safe_open(path, "pt") as handle:
        metadata = {**handle.metadata(), **vocabulary(10).to_metadata()}
    save_file(load_file(path), path, metadata)
    with pytest.raises(WeightsError, match="names 10 tags but its weights have 11"):
        read_dape(path)


def test_a_missing_weight_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "dape.safetensors"
    write_dape(path, tiny_dape(), vocabulary())
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    save_file({key: t for key, t in load_file(path).items() if key != "fc.bias"}, path, metadata)
    with pytest.raises(WeightsError, match=r"dape\.safetensors: .*1 keys are missing \['fc\.bias'\]"):
        read_dape(path)


def test_stage_1_adapter_equals_the_published_layout(tmp_path: Path) -> None:
    published = {key: t for key, t in adapter().items() if not key.startswith("text_decoder")}
    path = tmp_path / "dape-lora.safetensors"
    write_adapter(path, published_lora_to_peft(published), {"r": 2, "lora_alpha": 3}, source="debug")
    found, scaling = read_adapter(path)
    assert scaling == 1.5
    assert found.keys() == published.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in published.items())


def test_stage_1_adapter_merges_with_its_own_scaling(tmp_path: Path) -> None:
    dape, path = tiny_dape(), tmp_path / "dape-lora.safetensors"
    write_adapter(path, published_lora_to_peft(adapter()), {"r": 2, "lora_alpha": 1})
    found = read_ram(publish(tmp_path / "ram.pth", dape), path)
    expected = merge_published_lora(dape.state_dict(), adapter(), scaling=0.5)
    assert_same_outputs(found, DAPE.from_state_dict(expected, dape.config))


def test_an_adapter_of_another_size_names_its_file(tmp_path: Path) -> None:
    wide = {key: t.repeat(1, 2) if key.endswith("lora_A") else t for key, t in adapter().items()}
    torch.save(wide, tmp_path / "DAPE.pth")
    with pytest.raises(WeightsError, match=r"DAPE\.pth: The adapter of .* of different sizes"):
        read_ram(publish(tmp_path / "ram.pth", tiny_dape()), tmp_path / "DAPE.pth")


def test_ram_and_adapter_in_each_others_place(tmp_path: Path) -> None:
    ram = publish(tmp_path / "ram.pth", tiny_dape())
    torch.save(adapter(), tmp_path / "DAPE.pth")
    with pytest.raises(WeightsError, match="looks like the published DAPE adapter; expected the RAM tagger"):
        read_ram(tmp_path / "DAPE.pth")
    with pytest.raises(WeightsError, match=r"looks like the RAM tagger .* expected the published DAPE adapter"):
        read_ram(ram, ram)


def test_another_file_is_named(tmp_path: Path) -> None:
    path = write_zeros(tmp_path / "dape.safetensors", {"decoder.mid_block.resnets.0.norm1.weight": (8,)})
    with pytest.raises(WeightsError, match=r"looks like a VAE alone; expected a DAPE file .*trainer\.stage1"):
        read_dape(path)
