"""Stage 1 of a tagger with EfficientNet-Lite0: which layers are adapted, training, files, merging by `convert`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from seesr_core.cli import main as cli
from seesr_core.dape import DAPE, merge_published_lora
from seesr_core.dape.lora import lora_target_modules, peft_lora_to_published, published_lora_to_peft
from seesr_core.errors import WeightsError
from seesr_core.formats.ram import read_adapter, read_dape, write_dape
from seesr_core.formats.sources import TAG_LISTS
from trainer.engine.loop import train
from trainer.stage1 import command as stage1
from trainer.stage1.networks import add_lora, export
from trainer.stage1.task import Stage1Task

from . import test_stage1
from .dape_nets import LITE, images, lite_dape, seeded
from .test_stage1 import VOCABULARY, debug, losses_of_one_batch, require_exact_resume

HEAD = "visual_encoder._conv_head"
photos = test_stage1.photos


def make_task(photos: Path, **loop: Any) -> Stage1Task:
    return test_stage1.make_task(photos, debug(**loop), teacher=lite_dape())


def test_all_pointwise_convolutions_are_adapted_and_nothing_changes_at_first() -> None:
    teacher = lite_dape().requires_grad_(False)
    targets = lora_target_modules(teacher)
    # 15 of 16 blocks expand, all project; the last convolution; query and key of two layers of the head.
    assert len(targets) == 15 + 16 + 1 + 4
    assert f"{HEAD}" in targets
    assert all(teacher.get_parameter(f"{name}.weight").shape[2:] in ((), (1, 1)) for name in targets)
    student = add_lora(copy.deepcopy(teacher), debug(), seeded()).eval()
    torch.testing.assert_close(student(images(2, 64)).logits_BN, teacher(images(2, 64)).logits_BN, rtol=0, atol=1e-6)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets)
    a = trained[f"base_model.model.{HEAD}.lora_A.default.weight"]
    assert a.shape == (8, 320, 1, 1)
    assert 0.8 * 320**-0.5 < a.abs().max() <= 320**-0.5


def adapter() -> dict[str, torch.Tensor]:
    return {
        f"{HEAD}.lora_A": torch.randn(2, 320, 1, 1, generator=seeded(1)),
        f"{HEAD}.lora_B": torch.randn(1280, 2, 1, 1, generator=seeded(2)),
    }


def test_merging_adds_the_product_to_a_convolution() -> None:
    state, pair = lite_dape().state_dict(), adapter()
    merged = merge_published_lora(state, pair, scaling=0.5)
    a, b = (pair[f"{HEAD}.lora_{half}"][..., 0, 0] for half in "AB")
    expected = state[f"{HEAD}.weight"] + 0.5 * torch.einsum("or,ri->oi", b, a)[..., None, None]
    torch.testing.assert_close(merged[f"{HEAD}.weight"], expected, rtol=0, atol=1e-5)
    assert [key for key in state if not torch.equal(state[key], merged[key])] == [f"{HEAD}.weight"]


def test_layouts_convert_without_loss() -> None:
    back = peft_lora_to_published(published_lora_to_peft(adapter()))
    assert back.keys() == adapter().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in adapter().items())


@pytest.mark.parametrize(
    ("layer", "a", "b"),
    [
        (HEAD, (2, 320), (1280, 2)),
        (HEAD, (2, 319, 1, 1), (1280, 2, 1, 1)),
        (HEAD, (2, 320, 1, 1), (1280, 3, 1, 1)),
        (HEAD, (2,), (1280,)),
        ("visual_encoder._conv_stem", (2, 3, 3, 3), (32, 2, 1, 1)),
        ("tagging_head.encoder.layer.0.output.LayerNorm", (2, 24), (24, 2)),
    ],
)
def test_unfit_adapters_are_refused(layer: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    pair = {f"{layer}.lora_A": torch.zeros(a), f"{layer}.lora_B": torch.zeros(b)}
    with pytest.raises(WeightsError, match="different sizes"):
        merge_published_lora(lite_dape().state_dict(), pair)


def test_training_on_one_batch_brings_the_student_nearer_to_the_teacher(photos: Path) -> None:
    figures = losses_of_one_batch(make_task(photos), 0.01)
    assert figures[-1] < 0.9 * figures[0]


def test_a_resumed_run_equals_an_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    expected = require_exact_resume(lambda: make_task(photos), tmp_path)
    assert any(name.startswith(f"base_model.model.{HEAD}.lora_B") and tensor.any() for name, tensor in expected.items())


def test_adapter_merged_file_and_conversion_are_one_model(photos: Path, tmp_path: Path) -> None:
    task = make_task(photos, learning_rate=0.02)
    tensors = train(task, task.config.loop, tmp_path)
    task.trained.load_state_dict(tensors, strict=False)
    x = images(2, 64)
    expected = task.trained.eval()(x).logits_BN
    merged, _ = read_dape(export(task.trained, tensors, task.config, VOCABULARY, tmp_path, source="test"))
    assert merged.config == LITE
    torch.testing.assert_close(merged(x).logits_BN, expected, rtol=0, atol=1e-5)
    lora, scaling = read_adapter(tmp_path / "dape-lora.safetensors")
    again = merge_published_lora(lite_dape().state_dict(), lora, scaling=scaling)
    torch.testing.assert_close(DAPE.from_state_dict(again, LITE)(x).logits_BN, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(lite_dape()(x).logits_BN, expected, atol=1e-3)
    torch.save({"model": lite_dape().state_dict()}, tmp_path / "tagger.pth")
    for name, lines in zip(TAG_LISTS, (VOCABULARY.tags, ["0.5"] * 11, VOCABULARY.tags), strict=True):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    parts = [str(tmp_path / name) for name in ("tagger.pth", "dape-lora.safetensors", TAG_LISTS[0])]
    converted = tmp_path / "converted.safetensors"
    assert cli.main(["convert", *parts, "--dtype", "fp32", "--out", str(converted)]) == 0
    found = read_dape(converted)[0].state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in again.items())


def test_the_command_trains_it(photos: Path, tmp_path: Path) -> None:
    teacher, out = tmp_path / "tagger.safetensors", tmp_path / "run"
    write_dape(teacher, lite_dape(), VOCABULARY, dtype=torch.float32)
    given = ("--teacher", teacher, "--data", photos, "--out", out, "--loop.steps", "1", "--loop.precision", "bf16")
    assert stage1.main(["--recipe", "debug", *map(str, given)]) == 0
    assert read_dape(out / "dape.safetensors")[0].config == LITE
