"""Plans for machines that are not at hand, on small networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seesr_core.errors import SettingsError
from trainer.capacity.counting import Counted, count, count_segsr, count_student
from trainer.capacity.dry_run import GIB
from trainer.capacity.scale import ScaleCommand, layout, lines
from trainer.distill.recipes import DISTILL_RECIPES
from trainer.engine.command import get_recipe
from trainer.nano.tagger import tagger_config
from trainer.segsr.recipes import SEGSR_RECIPES
from trainer.stage2.recipes import STAGE2_RECIPES

from .small_nets import unet_config

COUNTED = Counted(
    trained=10**9,
    steered=2 * 10**9,
    frozen=10**9,
    steered_bytes=8 * 10**9,
    frozen_bytes=4 * 10**9,
    trained_flops=4e12,
    frozen_flops=1e12,
    fixed=GIB,
    per_image=float(GIB),
)


def options(**changes: Any) -> ScaleCommand:
    """The paper's recipe on a machine."""
    return ScaleCommand(recipe="paper", config=get_recipe(STAGE2_RECIPES, "paper"), **changes)


@pytest.mark.slow
def test_shapes_alone_tell_parameters_arithmetic_and_memory() -> None:
    recipe = get_recipe(STAGE2_RECIPES, "debug")
    found = count(recipe, unet=unet_config(), tagger=tagger_config(2, 64))
    fewer = count(replace(recipe, trained="rca-image-encoder"), unet=unet_config(), tagger=tagger_config(2, 64))
    assert 0 < fewer.trained < found.trained < found.steered == fewer.steered
    with pytest.raises(SettingsError, match="--dry-run"):
        count(replace(recipe, trained="lora"), unet=unet_config(), tagger=tagger_config(2, 64))
    assert fewer.trained_flops < found.trained_flops
    assert found.frozen_flops == fewer.frozen_flops > 0
    assert found.per_image > 3 * 64 * 64 * 4
    kept = count(replace(recipe, frozen_dtype="bf16"), unet=unet_config(), tagger=tagger_config(2, 64))
    assert (kept.trained, kept.steered, kept.frozen) == (found.trained, found.steered, found.frozen)
    # Half of the frozen weights go, but for norms and biases, which are few.
    frozen = 4 * (found.steered - found.trained + found.frozen)
    spared = found.steered_bytes + found.frozen_bytes - kept.steered_bytes - kept.frozen_bytes
    assert 0.48 * frozen < spared < 0.5 * frozen
    one, two = (found.memory(images, recipe, 1) for images in (1, 2))
    assert two["activations"] - one["activations"] == found.per_image
    assert found.memory(1, recipe, 4)["gradients"] == found.trained


@pytest.mark.slow
def test_a_student_and_its_follower_are_counted_once_with_their_teacher() -> None:
    sizes: dict[str, Any] = {"unet": unet_config(), "tagger": tagger_config(2, 64)}
    recipe = replace(get_recipe(DISTILL_RECIPES, "debug"), crop=64)
    both = count_student(recipe, **sizes)
    alone = count_student(replace(recipe, matching_weight=0.0, student_steps=2), **sizes)
    assert both.trained == 2 * alone.trained > 0
    assert both.steered - both.trained == alone.steered - alone.trained
    assert both.steered_bytes == 4 * both.steered
    assert min(both.per_image, both.trained_flops, both.frozen_flops) > 0


@pytest.mark.slow
def test_segsr_is_counted_beside_the_model_that_it_joins() -> None:
    sizes: dict[str, Any] = {"unet": unet_config(), "tagger": tagger_config(2, 64)}
    recipe = replace(get_recipe(SEGSR_RECIPES, "debug"), trained="image-encoder", own=0.0)
    joint, alone = count_segsr(recipe, **sizes), count(recipe, **sizes)
    added = joint.trained - alone.trained
    assert 0 < added == joint.steered - alone.steered
    assert joint.steered_bytes - alone.steered_bytes == 4 * added
    assert joint.trained_flops > alone.trained_flops
    own = count_segsr(replace(recipe, own=1.0, unroll=2), **sizes)
    assert (own.trained_flops, own.per_image) == (joint.trained_flops, joint.per_image)
    assert own.frozen_flops > joint.frozen_flops == alone.frozen_flops


def test_the_largest_pass_that_fits_divides_the_batch() -> None:
    # 12 GB of weights, 4 of gradients, 8 of moments: 22.4 GiB, and one for the pass itself.
    small = layout(options(memory=24 + 2 + 4), COUNTED)
    assert (small.images, small.accumulation) == (4, 6)
    large = layout(options(memory=80), COUNTED)
    assert (large.images, large.accumulation) == (24, 1)
    sharded = layout(options(memory=24, shard=True), COUNTED)
    assert (sharded.images, sharded.accumulation) == (12, 2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"One image a pass takes 24\.4 GiB and 22\.0 GiB are there"):
        layout(options(memory=24), COUNTED)
    with pytest.raises(SettingsError, match="192 images cannot be divided between 7 GPUs"):
        layout(options(gpus=7), COUNTED)
    with pytest.raises(SettingsError, match="utilisation at most 1"):
        options(utilisation=1.5)


def test_hours_follow_from_arithmetic_or_from_the_links() -> None:
    text = "\n".join(lines(options(tflops=100.0, utilisation=0.5), COUNTED))
    # 192 images of 5 TFLOP at 8 × 50 TFLOPS are 2.4 s.
    assert "80.0 images/s at 50% of 100 TFLOPS a GPU; 2.40 s a step" in text
    assert "hours: 100 for 150,000 steps of 192 images" in text
    assert "limited by: arithmetic" in text
    slow = "\n".join(lines(options(tflops=100.0, utilisation=0.5, gpus=32, nodes=4, link=1.0), COUNTED))
    assert "gradients: 7.75 s a step" in slow
    assert "hours: 323" in slow
    assert "limited by: the links" in slow
