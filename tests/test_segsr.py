"""SegSR's core: labels as bits, the two processes and what they tell each other, and the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seesr_core.errors import DataError, SettingsError, WeightsError
from seesr_core.formats.metadata import save_safetensors
from seesr_core.formats.segsr import read_segsr, segsr_metadata, write_segsr
from seesr_core.formats.tensorfile import read_header
from seesr_core.models import with_segsr
from seesr_core.pipeline import Result, SeeSRPipeline
from seesr_core.segsr.joint import JointRun, segmentation_noise
from seesr_core.segsr.labels import (
    VOID,
    check_labels,
    codes,
    embed_labels,
    enlarge_labels,
    majority,
    nearest_labels,
    paint,
)

from .segsr_nets import CLASSES, tiny_segsr
from .tiny_model import photo, tiny_models


@pytest.mark.parametrize(("classes", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (150, 8), (171, 8)])
def test_every_class_has_bits_of_its_own_and_comes_back_from_them(classes: int, bits: int) -> None:
    labels = torch.arange(classes).view(1, 1, -1)
    for code, channels in ((codes(classes), bits), (codes(classes, "one-hot"), classes)):
        assert code.shape == (classes, channels)
        assert len(code.unique(dim=0)) == classes
        assert torch.equal(nearest_labels(embed_labels(labels, code), code), labels)


def test_noisy_bits_never_name_a_class_outside_the_list() -> None:
    found = nearest_labels(torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)), codes(5))
    assert set(found.unique().tolist()) == set(range(5))


def test_void_is_zero_in_bits_and_black_in_pictures() -> None:
    labels = torch.tensor([[[0, VOID]]])
    assert embed_labels(labels, codes(5))[0, :, 0, 1].tolist() == [0, 0, 0]
    assert paint(labels, CLASSES.palette)[0, :, 0].T.tolist() == [[0, 90, 200], [0, 0, 0]]


def test_a_cell_has_the_label_of_most_of_its_pixels() -> None:
    labels = torch.tensor([[[1, 1, VOID, VOID], [1, 3, VOID, 2]]])
    assert majority(labels, 1, 2).tolist() == [[[1, VOID]]]
    assert enlarge_labels(majority(labels, 1, 2), 2, 4).tolist() == [[[1, 1, VOID, VOID]] * 2]


def test_a_label_outside_the_list_is_refused() -> None:
    check_labels(torch.tensor([0, 4, VOID]), 5)
    with pytest.raises(DataError, match="holds the label 5; expected 0 to 4"):
        check_labels(torch.tensor([0, 5]), 5)


def test_the_step_of_the_segmentation_keeps_the_noise_it_began_with() -> None:
    segsr, noise = tiny_segsr(), torch.randn(1, 3, 4, 4)
    bits = embed_labels(torch.randint(0, 5, (1, 4, 4)), codes(5))
    start = segsr.start(noise, 0.3, bits)
    torch.testing.assert_close(segsr.step(start, bits, 0.3, 0.8), segsr.start(noise, 0.8, bits))
    torch.testing.assert_close(segsr.step(start, bits, 0.3, 1.0), 0.5 * bits)


def run(strength: float = 1.0, **options: Any) -> JointRun:
    segsr = tiny_segsr()

    def predict(noisy: Tensor, acp: float, image: Tensor | None) -> Tensor:
        features = torch.zeros(1, 12, 8, 8)
        found: Tensor = segsr.segdm(noisy, features, torch.full((1,), acp), image)
        return found

    return JointRun(segsr, predict, torch.randn(1, 3, 8, 8), strength=strength, **options)


def test_a_level_that_is_asked_for_twice_has_one_answer_whatever_came_between() -> None:
    joint = run()
    joint.at(0.2)
    joint.saw(0.2, torch.randn(1, 4, 8, 8))
    first = joint.at(0.5)
    joint.saw(0.5, torch.randn(1, 4, 8, 8))
    joint.at(0.9)
    assert joint.at(0.5) is first
    assert first.condition is not None


def test_a_level_between_two_others_goes_on_from_the_nearest_noisier_one() -> None:
    """dpm_2 and the like look ahead and come back."""
    joint = run()
    z0 = torch.randn(1, 4, 8, 8)
    for acp in (0.2, 0.9):
        joint.at(acp)
        joint.saw(acp, z0)
    before = joint.at(0.2)
    torch.testing.assert_close(joint.at(0.5).noisy, joint.segsr.step(before.noisy, before.s0, 0.2, 0.5))


def test_at_strength_0_the_picture_is_told_nothing() -> None:
    joint = run(0.0)
    joint.at(0.2)
    joint.saw(0.2, torch.randn(1, 4, 8, 8))
    assert joint.at(0.5).condition is None


def test_the_segmentation_to_start_from_is_in_the_start() -> None:
    bits = embed_labels(torch.full((1, 8, 8), 3), codes(5))
    joint, noise = run(initial=bits), None
    noise = joint.noise
    torch.testing.assert_close(joint.at(0.36).noisy, 0.6 * 0.5 * bits + 0.8 * noise)


def test_the_noise_of_a_picture_depends_on_its_own_seed_alone() -> None:
    like = torch.empty(3, 3, 4, 4)
    noise = segmentation_noise([5, 6, 5], like)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(segmentation_noise([6], like[:1])[0], noise[1])


def pixels(result: Result) -> np.ndarray:
    return np.asarray(result.image)


@pytest.mark.parametrize("tile", [768, 64])
def test_before_training_the_picture_is_bit_for_bit_that_of_seesr(tile: int) -> None:
    plain = SeeSRPipeline(models=tiny_models())
    joined = SeeSRPipeline(models=tiny_models(segsr=tiny_segsr(trained=False)))
    settings = plain.settings(steps=4, tile=tile, overlap=16)
    one, other = plain(photo(24, 20), settings), joined(photo(24, 20), settings)
    assert np.array_equal(pixels(one), pixels(other))
    assert one.labels is None
    assert other.labels is not None
    assert other.labels.shape == (80, 96)


@pytest.mark.parametrize("tile", [768, 64])
def test_a_trained_bridge_changes_the_picture_and_a_batch_equals_single_runs(tile: int) -> None:
    plain = SeeSRPipeline(models=tiny_models())
    joined = SeeSRPipeline(models=tiny_models(segsr=tiny_segsr()))
    settings = plain.settings(steps=4, tile=tile, overlap=16)
    photos = [photo(24, 20, seed=1), photo(24, 20, seed=2)]
    batch = joined.run(photos, settings)
    assert not np.array_equal(pixels(batch[0]), pixels(plain(photos[0], settings)))
    for i, result in enumerate(batch):
        alone = joined(photos[i], replace(settings, seed=i))
        assert np.abs(pixels(alone).astype(int) - pixels(result).astype(int)).max() <= 1
        assert alone.labels is not None
        assert result.labels is not None
        assert (alone.labels == result.labels).float().mean() > 0.99


def test_the_file_brings_everything_back_and_changes_the_controlnet(tmp_path: Path) -> None:
    segsr, models = tiny_segsr(), tiny_models()
    first, second = "controlnet_cond_embedding.conv_in.bias", "mid_block.attentions.0.proj_in.weight"
    before = {key: dict(models.controlnet.named_parameters())[key].clone() for key in (first, second)}
    rows = before[second].shape[0]
    low = {f"{second}.lora_A": torch.ones(1, before[second].shape[1]), f"{second}.lora_B": torch.ones(rows, 1)}
    segsr.control = {f"{first}.diff": torch.full_like(before[first], 0.5), **low}
    segsr.about = {"recipe": "debug"}
    write_segsr(tmp_path / "segsr.safetensors", segsr, dtype=torch.float32)
    try:
        joined = with_segsr(models, tmp_path / "segsr.safetensors")
        after = dict(joined.controlnet.named_parameters())
        torch.testing.assert_close(after[first], before[first] + 0.5)
        torch.testing.assert_close(after[second], before[second] + 1)
    finally:  # the networks are shared by all tests
        for key, tensor in before.items():
            dict(models.controlnet.named_parameters())[key].data.copy_(tensor)
    assert joined.segsr is not None
    assert joined.defaults["start_timestep"] == 700
    assert (joined.segsr.classes, joined.segsr.config) == (CLASSES, segsr.config)
    assert joined.segsr.about == {"recipe": "debug"}
    assert all(torch.equal(value, segsr.state_dict()[key]) for key, value in joined.segsr.state_dict().items())


def test_a_model_of_other_sizes_is_refused_by_what_differs(tmp_path: Path) -> None:
    write_segsr(tmp_path / "segsr.safetensors", tiny_segsr(latent_channels=16))
    with pytest.raises(SettingsError, match=r"latent channels 16, this one has 4; choose the SeeSR model"):
        with_segsr(tiny_models(), tmp_path / "segsr.safetensors")


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("classes", '["sky"]', "a length from 2 to 255"),
        ("classes", '["sky", "wall", "grass"]', "3 classes and 5 colours"),
        ("palette", "[[0, 0, 999]]", "from 0 to 255"),
        ("config", '{"latent_channels": 4, "token_width": 8, "hint_channels": 32, "widths": [12, 20]}', "multiples"),
        ("config", '{"latent_channels": 4}', "should have the entry"),
        ("version", "99", "Update the project"),
    ],
)
def test_what_a_damaged_file_says_is_refused_in_one_sentence(
    tmp_path: Path, entry: str, value: str, reason: str
) -> None:
    segsr, path = tiny_segsr(), tmp_path / "segsr.safetensors"
    save_safetensors(path, segsr.state_dict(), {**segsr_metadata(segsr), entry: value})
    with pytest.raises(WeightsError, match=reason):
        read_segsr(path)


def test_weights_that_contradict_their_configuration_are_refused(tmp_path: Path) -> None:
    segsr, path = tiny_segsr(), tmp_path / "segsr.safetensors"
    state = segsr.state_dict()
    state["bridge.image.conv_in.weight"] = state["bridge.image.conv_in.weight"][:4]
    save_safetensors(path, state, segsr_metadata(segsr))
    with pytest.raises(WeightsError, match="damaged or another file"):
        read_segsr(path)
    assert read_header(path).metadata["format"] == "seesr-segsr"
