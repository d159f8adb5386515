"""The command of stage 2, and the run that it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from seesr_core.formats.base import load_base
from seesr_core.formats.control import read_control
from seesr_core.formats.ram import read_dape
from seesr_core.model_files import NANO, find_model
from seesr_core.models import base_defaults

from ..capacity.dry_run import sample, show, small_dry_run
from ..data.crops import write_skipped
from ..data.pairs import make_crops, say_what_lr_is
from ..data.photos import Photo, read_photos
from ..engine import command
from ..engine.frozen import check_frozen
from ..engine.hub import check_hub, push
from ..engine.loop import train
from ..engine.loop_config import LoopConfig
from ..engine.needs import check_needs
from ..engine.processes import is_main_process
from .batches import tag_prompts
from .export import export
from .networks import Networks, build_networks
from .recipes import STAGE2_RECIPES, Stage2Config
from .task import Stage2Task
from .validation import VALIDATION_STEPS, Validation


@dataclass(kw_only=True)
class Stage2Command(command.UploadingCommand):
    """Train ControlNet, image encoder and RCA. The same command again resumes; the flags below override the recipe."""

    data: str
    """Photos with tags: a .jsonl list as `python -m trainer.tag` writes it, webdataset shards (.tar, also at an
    address), or a mixture of those (.toml)."""
    base: Path
    """Base model: diffusers folder (SD-2-base) or our single file; the recipes nano and debug have the embedded one."""
    dape: Path
    """Degradation-aware tagger of stage 1, `dape*.safetensors`; the recipes nano and debug have the embedded one."""
    config: Annotated[Stage2Config, command.SETTINGS]
    """Settings that override the recipe's."""
    validate: Path | None = None
    """Folder with LR and HR, pairs to judge the run by; `python -m trainer.evaluate.degrade` makes some."""
    niqe_params: Path | None = None
    """NIQE's published parameters (.npz), to have it among the figures."""
    metrics: tuple[str, ...] = ()
    """Further figures of the validation, by their names in `python -m trainer.evaluate`, such as lpips."""
    init: Path | None = None
    """Start from these `seesr*.safetensors` weights instead of fresh ones."""
    export: Literal["fp16", "fp32"] = "fp16"
    """Precision of the exported weights; fp32 has twice the size and gives the validation's pictures to rounding."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> Stage2Command:
    """The command that arguments stand for."""
    nano = find_model(NANO)
    embedded = {"base": nano.base, "dape": nano.tagger.weights}
    defaults = {"nano": embedded, "debug": embedded}
    return command.parse(Stage2Command, STAGE2_RECIPES, argv, prog="python -m trainer.stage2", defaults=defaults)


def run(options: Stage2Command) -> Path | None:
    """Read what the command names, train (or resume) and export; returns the exported file."""
    check_needs(options.config.loop)
    check_frozen(options.config.frozen_dtype)
    check_hub(options.push_to_hub)
    photos, config = read_photos(options.data), options.config
    say_what_lr_is(photos)
    dape, vocabulary = read_dape(options.dape)
    start = read_control(options.init) if options.init else None
    base = load_base(options.base)
    networks = build_networks(base, dape, config, start)
    if options.dry_run:
        crops = make_crops(sample(photos), config, workers=0, memory=0)

        def build(loop: LoopConfig) -> Stage2Task:
            return Stage2Task(replace(config, loop=loop, pool=0), networks, crops, [""] * len(crops))

        show(replace(small_dry_run(build, config.loop), photos=len(photos)))
        return None
    defaults = {**(start.defaults if start else {}), **config.sampling()}
    about: dict[str, Any] = {"base": options.base.name, "recipe": options.recipe, "defaults": defaults}
    about["dtype"] = {"fp16": torch.float16, "fp32": torch.float32}[options.export]
    settings = {"steps": VALIDATION_STEPS, **base_defaults(base), **defaults}
    judge = Validation.of_folder(options.validate, vocabulary, settings, options.niqe_params, options.metrics)
    result = train_control(config, networks, photos, options.out, validation=judge, **about)
    push(result, options.out, options.push_to_hub)
    return result


def train_control(
    config: Stage2Config,
    networks: Networks,
    photos: Sequence[Photo],
    out: Path,
    *,
    pool_folder: Path | None = None,
    validation: Validation | None = None,
    **about: Any,
) -> Path:
    """Train (or resume) and write `seesr-control.safetensors`; `about` goes to `export`."""
    crops = make_crops(photos, config)
    if is_main_process():
        write_skipped(crops, out)
    tags, folder = tag_prompts(crops.photos), pool_folder or out / "pool"
    texts = out / "texts" if config.cache_texts else None
    folders = {"pool_folder": folder, "text_folder": texts, "pair_folder": out / "pairs"}
    task = Stage2Task(config, networks, crops, tags, **folders, validation=validation)
    try:
        weights = train(task, config.loop, out, identity=task.identity())
    finally:
        task.write_caches()
    path = out / "seesr-control.safetensors"
    export(task, weights, path, **about)
    return path
