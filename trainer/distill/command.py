"""The command of distillation, and the run that it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from seesr_core.formats.base import load_base
from seesr_core.formats.control import read_control, read_published
from seesr_core.model_files import NANO, find_model
from seesr_core.models import base_defaults, read_tagger

from ..capacity.dry_run import sample, show, small_dry_run
from ..data.crops import Crops, write_skipped
from ..data.pairs import make_crops, say_what_lr_is
from ..data.photos import Photo, read_photos
from ..deep_features import load_efficientnet
from ..engine import command
from ..engine.frozen import check_frozen
from ..engine.hub import check_hub, push
from ..engine.loop import train
from ..engine.loop_config import LoopConfig
from ..engine.needs import check_needs
from ..engine.processes import is_main_process
from ..stage2.batches import tag_prompts
from ..stage2.networks import Networks, build_networks
from ..stage2.validation import Validation
from .export import export
from .recipes import DISTILL_RECIPES, DistillConfig
from .task import DistillTask, frozen_teacher


@dataclass(kw_only=True)
class DistillCommand(command.UploadingCommand):
    """Make a student of one to four steps of a SeeSR model. The same command again resumes; the flags below override
    the recipe."""

    data: str
    """Photos with tags, as stage 2 takes them."""
    teacher_model: str = NANO
    """The teacher: a folder with base, control part and tagger, or `nano`, the embedded small model."""
    config: Annotated[DistillConfig, command.SETTINGS]
    """Settings that override the recipe's."""
    validate: Path | None = None
    """Folder with LR and HR, pairs to judge the run by; `python -m trainer.evaluate.degrade` makes some."""
    niqe_params: Path | None = None
    """NIQE's published parameters (.npz), to have it among the figures."""
    metrics: tuple[str, ...] = ()
    """Further figures of the validation, by their names in `python -m trainer.evaluate`, such as lpips."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> DistillCommand:
    """The command that arguments stand for."""
    return command.parse(DistillCommand, DISTILL_RECIPES, argv, prog="python -m trainer.distill")


def run(options: DistillCommand) -> Path | None:
    """Read what the command names, distil (or resume) and export; returns the model's folder."""
    check_needs(options.config.loop)
    check_frozen(options.config.frozen_dtype)
    check_hub(options.push_to_hub)
    config, photos = options.config, read_photos(options.data)
    say_what_lr_is(photos)
    files = find_model(options.teacher_model)
    control = read_published(files.control) if files.control.is_dir() else read_control(files.control)
    base, tagger = load_base(files.base), read_tagger(files.tagger)
    defaults = {**base_defaults(base), **control.defaults}
    teacher = frozen_teacher(build_networks(base, tagger[0], config, control))
    features = {"features": load_efficientnet() if config.deep_weight else None}
    if options.dry_run:
        _plan(config, teacher, photos, teacher_defaults=defaults, **features)
        return None
    student = {**defaults, **config.student()}
    judge = Validation.of_folder(options.validate, tagger[1], student, options.niqe_params, options.metrics)
    crops = _crops(photos, config, options.out)
    task = DistillTask(
        config,
        teacher,
        crops,
        tag_prompts(crops.photos),
        teacher_defaults=defaults,
        validation=judge,
        pool_folder=options.out / "shown",
        **features,
    )
    weights = train(task, config.loop, options.out, identity=task.identity())
    if not is_main_process():
        return None
    kept = load_base(files.base) if config.frozen_dtype != "fp32" else base
    about: dict[str, Any] = {"recipe": options.recipe, "defaults": student}
    whole: dict[str, Any] = {"base": kept, "control": control, "tagger": read_tagger(files.tagger)}
    result = export(task, weights, options.out, **whole, **about)
    push(result, options.out, options.push_to_hub)
    return result


def _crops(photos: Sequence[Photo], config: DistillConfig, out: Path) -> Crops:
    crops = make_crops(photos, config)
    if is_main_process():
        write_skipped(crops, out)
    return crops


def _plan(config: DistillConfig, teacher: Networks, photos: Sequence[Photo], **more: Any) -> None:
    """Show what the run takes, from passes of one and of two images."""
    crops = make_crops(sample(photos), config, workers=0, memory=0)

    def build(loop: LoopConfig) -> DistillTask:
        return DistillTask(replace(config, loop=loop, pool=0), teacher, crops, [""] * len(crops), **more)

    show(replace(small_dry_run(build, config.loop), photos=len(photos)))
