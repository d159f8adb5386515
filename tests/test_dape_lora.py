"""Adapters of the tagger: the published layout, peft's layout, merging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seesr_core.dape import DAPE, merge_published_lora
from seesr_core.dape.lora import (
    ALPHA,
    RANK,
    fuse_qkv,
    lora_target_modules,
    peft_lora_to_published,
    published_lora_to_peft,
    unfuse_qkv,
)
from seesr_core.errors import SettingsError, WeightsError

from .dape_nets import CONFIG, images, seeded, tiny_dape

QKV = "visual_encoder.layers.1.blocks.0.attn.qkv"
KEY = "tagging_head.encoder.layer.1.crossattention.self.key"


def published_adapter(dape: DAPE) -> dict[str, Tensor]:
    """Random adapter in the layout of DAPE.pth, ballast included."""
    generator, adapter = seeded(7), {}
    for name, module in dape.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("qkv", "self.query", "self.key")):
            rows, columns = module.weight.shape
            parts, outputs = (2, rows // 3 * 2) if name.endswith("qkv") else (1, rows)
            adapter[f"{name}.lora_A"] = torch.randn(parts * RANK, columns, generator=generator)
            adapter[f"{name}.lora_B"] = torch.randn(outputs, RANK, generator=generator)
    ballast = "tag_encoder.encoder.layer.0.crossattention.self.query"
    adapter[f"{ballast}.lora_A"] = torch.randn(RANK, 24, generator=generator)
    adapter[f"{ballast}.lora_B"] = torch.randn(24, RANK, generator=generator)
    return adapter


def test_merging_adds_an_eighth_of_the_product_to_query_and_value() -> None:
    dape = tiny_dape()
    state, adapter = dape.state_dict(), published_adapter(dape)
    merged = merge_published_lora(state, adapter)
    a, b = adapter[f"{QKV}.lora_A"], adapter[f"{QKV}.lora_B"]
    change = (merged[f"{QKV}.weight"] - state[f"{QKV}.weight"]).chunk(3)
    torch.testing.assert_close(change[0], b[:32] @ a[:8] / 8, rtol=0, atol=1e-5)
    assert torch.count_nonzero(change[1]) == 0
    torch.testing.assert_close(change[2], b[32:] @ a[8:] / 8, rtol=0, atol=1e-5)
    expected = state[f"{KEY}.weight"] + adapter[f"{KEY}.lora_B"] @ adapter[f"{KEY}.lora_A"] / 8
    torch.testing.assert_close(merged[f"{KEY}.weight"], expected, rtol=0, atol=1e-5)


def test_merging_changes_adapted_layers_only_and_not_its_input() -> None:
    dape = tiny_dape()
    before = {key: value.clone() for key, value in dape.state_dict().items()}
    adapter = published_adapter(dape)
    merged = merge_published_lora(dape.state_dict(), adapter)
    changed = {key for key in before if not torch.equal(merged[key], before[key])}
    assert changed == {
        key.replace("lora_A", "weight") for key in adapter if key.endswith("A") and "tag_encoder" not in key
    }
    assert all(torch.equal(dape.state_dict()[key], before[key]) for key in before)


def test_merging_keeps_the_weights_dtype() -> None:
    dape = tiny_dape().half()
    merged = merge_published_lora(dape.state_dict(), published_adapter(dape))
    assert {value.dtype for value in merged.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda adapter: adapter.pop(f"{KEY}.lora_B"), "without partner"),
        (lambda adapter: adapter.clear(), "no DAPE adapter"),
        (lambda adapter: adapter.update({f"{KEY}.lora_B": torch.zeros(5, 8)}), "different sizes"),
        (lambda adapter: adapter.update({f"{QKV}.lora_A": torch.zeros(8, 32)}), "different sizes"),
        (lambda adapter: adapter.update({"x.lora_A": torch.zeros(8, 2), "x.lora_B": torch.zeros(2, 8)}), "'x'"),
    ],
)
def test_unfit_adapters_are_refused(spoil, message: str) -> None:
    dape = tiny_dape()
    adapter = published_adapter(dape)
    spoil(adapter)
    with pytest.raises(WeightsError, match=message):
        merge_published_lora(dape.state_dict(), adapter)


def test_unfusing_changes_no_output_and_fusing_restores_the_file() -> None:
    dape = tiny_dape().requires_grad_(False)
    before, expected = dape.state_dict(), dape(images())
    unfuse_qkv(dape)
    torch.testing.assert_close(dape(images()).logits_BN, expected.logits_BN, rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in dape.parameters())
    fuse_qkv(dape)
    after = dape.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(parameter.requires_grad for parameter in dape.parameters())


def test_targets_are_the_published_layers_and_need_unfused_projections() -> None:
    dape = tiny_dape()
    with pytest.raises(SettingsError, match="unfuse_qkv"):
        lora_target_modules(dape)
    adapter = published_adapter(dape)
    targets = lora_target_modules(unfuse_qkv(dape))
    assert {f"base_model.model.{name}.lora_A.weight" for name in targets} == {
        key for key in published_lora_to_peft(adapter) if key.endswith("lora_A.weight")
    }


def test_layouts_convert_without_loss() -> None:
    adapter = {key: value for key, value in published_adapter(tiny_dape()).items() if "tag_encoder" not in key}
    there = published_lora_to_peft(adapter)
    back = peft_lora_to_published(there)
    assert back.keys() == adapter.keys()
    assert all(torch.equal(back[key], adapter[key]) for key in adapter)
    without_prefix = {key.removeprefix("base_model.model."): value for key, value in there.items()}
    assert peft_lora_to_published(without_prefix).keys() == adapter.keys()


@pytest.mark.parametrize("lost", ["q", "v"])
def test_half_a_projection_is_refused(lost: str) -> None:
    adapter = published_lora_to_peft(published_adapter(tiny_dape()))
    for half in ("lora_A", "lora_B"):
        adapter.pop(f"base_model.model.{QKV}.{lost}.{half}.weight")
    with pytest.raises(WeightsError, match="do not belong"):
        peft_lora_to_published(adapter)


def test_an_adapter_of_other_layers_is_refused() -> None:
    adapter = published_lora_to_peft(published_adapter(tiny_dape()))
    adapter[f"base_model.model.{QKV}.k.lora_A.weight"] = torch.zeros(8, 32)
    with pytest.raises(WeightsError, match=r"qkv\.k"):
        peft_lora_to_published(adapter)


def test_peft_computes_what_the_merged_file_computes() -> None:
    peft = pytest.importorskip("peft")
    dape = tiny_dape()
    # Small B, as after training: at random size the logits would run away from any absolute tolerance.
    adapter = {key: value * 0.05 for key, value in published_adapter(dape).items()}
    merged = DAPE.from_state_dict(merge_published_lora(dape.state_dict(), adapter), CONFIG)
    expected = merged(images())
    unfuse_qkv(dape)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=lora_target_modules(dape))
    student = peft.get_peft_model(dape, config).eval()
    loaded = peft.set_peft_model_state_dict(student, published_lora_to_peft(adapter))
    assert not loaded.unexpected_keys
    torch.testing.assert_close(student(images()).tokens_BLD, expected.tokens_BLD, rtol=0, atol=1e-5)
    exported = peft_lora_to_published(peft.get_peft_model_state_dict(student))
    assert all(torch.equal(exported[key], value) for key, value in adapter.items() if "tag_encoder" not in key)
    with pytest.raises(SettingsError, match="merge_and_unload"):
        fuse_qkv(dape)
    final = fuse_qkv(student.merge_and_unload())
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(final.state_dict()[key], value, rtol=0, atol=1e-6)
