"""The sections about training: one step of each stage under a cap of memory, and FSDP2 on one card."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from seesr_core.dape import DAPE, DAPEConfig, Vocabulary
from seesr_core.method.rca import rca_parameters
from trainer.data.photos import read_photos
from trainer.engine.command import get_recipe
from trainer.engine.optimizers import build_optimizer
from trainer.stage1.recipes import STAGE1_RECIPES
from trainer.stage1.task import Stage1Task
from trainer.stage2.batches import tag_prompts
from trainer.stage2.networks import Networks
from trainer.stage2.recipes import STAGE2_RECIPES
from trainer.stage2.task import Stage2Task

from ..bench import nets
from .context import Context

CAPS_GIB = (24, 80)
GIB = 2**30
ROOT = Path(__file__).parents[2]


def stage1(context: Context) -> dict[str, Any]:
    """DAPE at its published size (tiny in a dry run)."""

    def task(folder: Path) -> Stage1Task:
        config = get_recipe(STAGE1_RECIPES, "debug" if context.small else "paper")
        sizes = _small_tagger() if context.small else DAPEConfig()
        teacher = nets.filled(DAPE(sizes), context.device, torch.float32)
        words = tuple(f"tag {i}" for i in range(teacher.config.num_tags))
        vocabulary = Vocabulary(tags=words, tags_zh=words, thresholds=torch.full((len(words),), 0.5))
        loop = replace(config.loop, device=str(context.device), batch_size=2 if context.small else 8, accumulation=1)
        return Stage1Task(replace(config, loop=loop, samples=1), teacher, vocabulary, read_photos(_photos(folder)))

    return _under_caps(context, task)


def stage2(context: Context) -> dict[str, Any]:
    """ControlNet and RCA at their published sizes (tiny in a dry run)."""

    def task(folder: Path) -> Stage2Task:
        from trainer.data.pairs import make_crops

        config = get_recipe(STAGE2_RECIPES, "debug" if context.small else "finetune-24gb")
        loop = replace(config.loop, device=str(context.device), batch_size=1, accumulation=1)
        config = replace(config, loop=loop, degradation_group=1)
        photos = read_photos(_photos(folder))
        return Stage2Task(config, _networks(context), make_crops(photos, config), tag_prompts(photos))

    return _under_caps(context, task)


def _small_tagger() -> Any:
    from tests.dape_nets import CONFIG

    return CONFIG


def _networks(context: Context) -> Networks:
    models = nets.core_models(context.net, "fp32", str(context.device))
    parts = {name: getattr(models, name) for name in ("unet", "controlnet", "vae", "text_encoder", "tokenizer", "dape")}
    networks = Networks(**parts)
    networks.controlnet.requires_grad_(True)
    for parameter in rca_parameters(networks.unet).values():
        parameter.requires_grad_(True)
    for net in (networks.unet, networks.controlnet):
        net.enable_gradient_checkpointing()
    return networks


def _photos(folder: Path) -> Path:
    """Photos of noise, as large as the crops of the recipes."""
    lines = []
    for index in range(4):
        pixels = torch.randint(0, 256, (640, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        lines.append(json.dumps({"file": f"{index}.png", "tags": ["a"]}))
    (folder / "photos.jsonl").write_text("\n".join(lines), "utf-8")
    return folder / "photos.jsonl"


def _under_caps(context: Context, build: Callable[[Path], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cap in CAPS_GIB:
        with tempfile.TemporaryDirectory() as folder, _capped(context, cap) as fits:
            name = f"cap of {cap} GiB"
            if not fits:
                found[name] = "more than the card has"
                continue
            try:
                found[name] = _one_step(context, build(Path(folder)))
            except torch.OutOfMemoryError as error:
                found[name] = f"does not fit: {str(error).splitlines()[0]}"
    return found


@contextmanager
def _capped(context: Context, gibibytes: int) -> Iterator[bool]:
    """Inside, this process may take so much of the card; a CPU has no such cap."""
    if context.device.type != "cuda":
        yield True
        return
    share = gibibytes * GIB / torch.cuda.get_device_properties(context.device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    try:
        yield share <= 1.0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _one_step(context: Context, task: Any) -> dict[str, Any]:
    """Forward, backward and optimizer step, the second of two timed."""
    loop = task.config.loop
    parameters = [p for p in task.trained.parameters() if p.requires_grad]
    optimizer = build_optimizer("adamw", parameters, learning_rate=1e-6, weight_decay=0.0)
    losses: list[float] = []

    def step() -> None:
        with torch.autocast(context.device.type, torch.bfloat16, enabled=not context.small):
            loss = task.loss(len(losses))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    first = context.wait(step)
    found: dict[str, float] = {}
    peak = context.peak(lambda: found.update(seconds=context.wait(step)))
    return {**found, "first s": first, "peak GiB": peak / GIB, "images": loop.micro_batch, "losses": losses}


def fsdp2(context: Context) -> dict[str, Any]:
    """Stage 2 of the embedded model by accelerate's launcher with FSDP2 on one card; on a CPU one plain process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = f"-m trainer.stage2 --recipe debug --data {_photos(folder)} --out {folder / 'run'} --loop.steps 2"
        words = ["-m", "accelerate.commands.launch", *_launcher(context), *train.split()]
        words += ["--loop.device", context.device.type]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        lines = map(json.loads, (folder / "run" / "log.jsonl").read_text("utf-8").splitlines())
        return {"losses": [line["loss"] for line in lines if "loss" in line]}


def _launcher(context: Context) -> list[str]:
    if context.device.type == "cuda":
        return ["--config_file", "trainer/accelerate/fsdp2.yaml", "--num_processes", "1"]
    return ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
