"""The recorded numbers through the path of a run: whole batches, on the device that trains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.data.crops import Crops
from trainer.degradation import Kernels, degrade
from trainer.engine.loop import train
from trainer.engine.processes import local_device
from trainer.stage2.batches import Batch
from trainer.stage2.recipes import stage2_debug
from trainer.stage2.task import Stage2Task

from .golden import golden_dir
from .parity.compare import Comparison
from .parity.groups import degradation, losses


class InABatch:
    """Recorded decisions about one photo, for a batch of which it is the first; the others get the same draws."""

    def __init__(self, recorded: degradation.RecordedDraws) -> None:
        self.uniform, self.chance, self.choice = recorded.uniform, recorded.chance, recorded.choice
        self.recorded = recorded

    def uniforms(self, count: int, low: float, high: float) -> Tensor:
        """One for each photo."""
        return self.recorded.uniforms(1, low, high).expand(count).clone()

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Recorded noise of the shape (B, …), or of a pattern (H, W) that all photos share."""
        if len(shape) == 2:
            return self.recorded.normal(shape)
        return self.recorded.normal((1, *shape[1:])).expand(*shape).clone()

    def poisson(self, rate: Tensor) -> Tensor:
        """Counts for rates (B, …)."""
        return self.recorded.poisson(rate[:1]).expand_as(rate).clone()


@pytest.mark.parametrize("run", ["run0", "run1", "run2"])
def test_degradation_of_a_batch_on_the_training_device(run: str) -> None:
    folder, device = golden_dir() / "degradation", local_device()
    meta, constants = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("meta", "constants"))
    inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    photo = degradation.from_u8(inputs[f"{run}.gt_u8_hwc"])
    batch = torch.cat([photo, photo.flip(3), 1 - photo]).to(device)
    kernels = [inputs[f"{run}.{name}"].expand(3, -1, -1) for name in ("kernel1", "kernel2", "sinc_kernel")]
    draws = degradation.RecordedDraws(meta["runs"][run]["draws_in_order"], inputs, f"{run}.")
    config = degradation.config_from(constants, meta["ops"]["usm"])
    given = Kernels(**dict(zip(("first", "second", "final"), kernels, strict=True)))
    pair = degrade(batch, config, InABatch(draws), given)
    assert draws.left == 0
    first = {name: getattr(pair, name)[:1].cpu() for name in ("lr", "lr_upsampled")}
    shown = degradation.to_u8(first["lr_upsampled"])
    found = [
        Comparison.of(
            "degradation", run, "lq", first["lr"], outputs[f"{run}.lq"], degradation.JPEG_TOLERANCE, metric="mean_abs"
        ),
        Comparison.u8("degradation", run, "sr_bicubic_u8", shown, outputs[f"{run}.sr_bicubic_u8_hwc"]),
    ]
    assert [line.line() for line in found if not line.ok] == []
    assert not torch.equal(pair.lr[0], pair.lr[2])


class GoldenTask(Stage2Task):
    """Stage 2 on the recorded latents, noise and prompts."""

    inputs: Mapping[str, Tensor]

    def batch(self, step: int) -> Batch:
        """The recorded images of a part of the step."""
        size = self.config.loop.micro_batch
        rows = {name: x[step * size : (step + 1) * size].to(self.device) for name, x in self.inputs.items()}
        condition = rows["cond_u8"].float() / 255
        return Batch(
            target=condition,
            condition=condition,
            latents=rows["latents"],
            noise=rows["noise"],
            timesteps=rows["timesteps"],
            soft_prompt=rows["soft"],
            prompts=[str(number) for number in range(step * size, (step + 1) * size)],
        )

    def text_states(self, prompts: Sequence[str]) -> Tensor:
        """The recorded ones of these images."""
        return self.inputs["text"][[int(number) for number in prompts]].to(self.device)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_and_gradients_of_a_step_of_the_loop(accumulation: int, tmp_path: Path) -> None:
    folder = golden_dir()
    meta: dict[str, Any] = json.loads((folder / "losses" / "stage2_meta.json").read_text("utf-8"))
    recipe = stage2_debug()
    loop = replace(
        recipe.loop,
        steps=1,
        batch_size=2,
        accumulation=accumulation,
        learning_rate=0.0,
        weight_decay=0.0,
        device="auto",
        sample_every=0,
    )
    networks = losses._tiny_networks(folder / "unet_controlnet", meta)
    task = GoldenTask(replace(recipe, loop=loop, degradation_group=1), networks, cast(Crops, None), ())
    task.inputs = load_file(folder / "losses" / "stage2_inputs.safetensors")
    train(task, loop, tmp_path)
    (line,) = (json.loads(text) for text in (tmp_path / "log.jsonl").read_text("utf-8").splitlines())
    assert line["loss"] == pytest.approx(meta["loss"], rel=losses.LOSS)
    assert line["grad_norm"] == pytest.approx(meta["total_grad_norm"], rel=losses.GRADIENT)
