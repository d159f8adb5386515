"""The command that trains SegSR, a reconstruction, and the run that it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from seesr_core.errors import SettingsError
from seesr_core.formats.base import load_base
from seesr_core.formats.control import read_control
from seesr_core.formats.ram import read_dape
from seesr_core.model_files import NANO, find_model
from seesr_core.segsr.model import ClassList, SegSR, SegSRConfig

from ..capacity.dry_run import sample, show, small_dry_run
from ..data.crops import write_skipped
from ..data.order import Stream, scoped_seed
from ..data.pairs import make_crops, say_what_lr_is
from ..data.photos import Photo, read_photos
from ..engine import command
from ..engine.loop import train
from ..engine.loop_config import LoopConfig
from ..engine.needs import check_needs
from ..engine.processes import is_main_process
from ..stage2.batches import tag_prompts
from ..stage2.networks import Networks, build_networks
from .export import export
from .masks import Layout, Masks, read_masks
from .recipes import SEGSR_RECIPES, SegSRTrainConfig
from .task import SegSRTask


@dataclass(kw_only=True)
class SegSRCommand(command.StageCommand):
    """Train SegDM and bridge around a frozen SeeSR model: SegSR, a reconstruction. The same command again resumes."""

    data: str
    """Photos, with or without given LR, as in stage 2."""
    masks: Path
    """Their labels: a folder of label pictures of the photos' names, or a COCO panoptic .json file."""
    base: Path
    """Base model; the recipes segsr-nano and debug have the embedded one, also for the next two."""
    dape: Path
    """Tagger, `dape*.safetensors`."""
    seesr: Path
    """SeeSR model, `seesr*.safetensors`."""
    config: Annotated[SegSRTrainConfig, command.SETTINGS]
    """Settings that override the recipe's."""
    layout: Layout = "plain"
    """Layout of the label pictures."""
    classes: Path | None = None
    """List of the classes; by default `classes.json` beside the label pictures."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> SegSRCommand:
    """The command that arguments stand for."""
    nano = find_model(NANO)
    embedded = {"base": nano.base, "dape": nano.tagger.weights, "seesr": nano.control}
    defaults = {"segsr-nano": embedded, "debug": embedded}
    return command.parse(SegSRCommand, SEGSR_RECIPES, argv, prog="python -m trainer.segsr", defaults=defaults)


def run(options: SegSRCommand) -> Path | None:
    """Read what the command names, train (or resume) and export; returns the exported file."""
    config = options.config
    check_needs(config.loop)
    photos = read_photos(options.data)
    say_what_lr_is(photos)
    masks = read_masks(options.masks, layout=options.layout, classes=options.classes)
    masks.check(photos)
    dape, vocabulary = read_dape(options.dape)
    networks = build_networks(load_base(options.base), dape, config, read_control(options.seesr))
    segsr = build_segsr(config, networks, masks.classes)
    if options.dry_run:
        crops = make_crops(sample(photos), config, workers=0, memory=0)

        def build(loop: LoopConfig) -> SegSRTask:
            return SegSRTask(replace(config, loop=loop, pool=0), networks, crops, segsr, masks, vocabulary=vocabulary)

        show(replace(small_dry_run(build, config.loop), photos=len(photos)))
        return None
    segsr.about = {"recipe": options.recipe, "step": str(config.loop.steps), "seesr": options.seesr.name}
    return train_segsr(config, networks, photos, segsr, masks, options.out, vocabulary=vocabulary)


def build_segsr(config: SegSRTrainConfig, networks: Networks, classes: ClassList) -> SegSR:
    """Fresh SegDM and bridge; their start depends on the seed alone.

    Raises:
        SettingsError: widths that cannot be.
    """
    control = networks.controlnet.config
    if min(config.widths, default=0) < 8:
        raise SettingsError(f"widths must be multiples of 8, found {list(config.widths)}.")
    sizes = SegSRConfig(
        latent_channels=control.in_channels,
        token_width=networks.dape.config.token_width,
        hint_channels=control.block_out_channels[0],
        widths=config.widths,
        token_channels=config.token_channels,
        bridge_width=config.bridge_width,
        label_scale=config.label_scale,
        embedding=config.embedding,
        bridged=config.mode == "joint",
    )
    with scoped_seed(config.loop.seed, Stream.SEGSR_WEIGHTS):
        return SegSR(sizes, classes, defaults=config.sampling())


def train_segsr(
    config: SegSRTrainConfig,
    networks: Networks,
    photos: Sequence[Photo],
    segsr: SegSR,
    masks: Masks,
    out: Path,
    **about: Any,
) -> Path:
    """Train (or resume) and write `segsr.safetensors`; `about` goes to the task."""
    crops = make_crops(photos, config)
    if is_main_process():
        write_skipped(crops, out)
    folders: dict[str, Any] = {
        "pool_folder": out / "pool",
        "text_folder": out / "texts" if config.cache_texts else None,
    }
    task = SegSRTask(config, networks, crops, segsr, masks, tags=tag_prompts(crops.photos), **folders, **about)
    before = {name: p.detach().clone() for name, p in networks.controlnet.named_parameters() if p.requires_grad}
    try:
        weights = train(task, config.loop, out, identity=task.identity())
    finally:
        task.write_caches()
    path = out / "segsr.safetensors"
    export(segsr, weights, before, path, dtype=torch.float16)
    return path
