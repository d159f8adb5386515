"""The command of stage 1, and the run that it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from seesr_core.dape import DAPE, Vocabulary
from seesr_core.model_files import NANO, find_model

from ..capacity.dry_run import sample, show, small_dry_run
from ..data.crops import write_skipped
from ..data.pairs import say_what_lr_is
from ..data.photos import Photo, read_photos
from ..engine import command
from ..engine.hub import check_hub, push
from ..engine.loop import train
from ..engine.loop_config import LoopConfig
from ..engine.needs import check_needs
from ..engine.processes import is_main_process
from .networks import export, read_teacher
from .recipes import STAGE1_RECIPES, Stage1Config
from .task import Stage1Task

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Stage1Command(command.UploadingCommand):
    """Train DAPE. The same command again resumes; single settings of the recipe are overridden by the flags below."""

    teacher: Path
    """The tagger: `dape*.safetensors`, or the published `ram_swin_large_14m.pth` together with --tag-lists; the recipe
    debug has the embedded one."""
    data: str
    """HR photos: a folder, a .jsonl list, webdataset shards (.tar, also at an address), or a mixture (.toml)."""
    config: Annotated[Stage1Config, command.SETTINGS]
    """Settings that override the recipe's."""
    tag_lists: Path | None = None
    """Folder with `ram_tag_list.txt`, `ram_tag_list_threshold.txt` and maybe `ram_tag_list_chinese.txt`."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> Stage1Command:
    """The command that arguments stand for."""
    defaults = {"debug": {"teacher": find_model(NANO).tagger.weights}}
    return command.parse(Stage1Command, STAGE1_RECIPES, argv, prog="python -m trainer.stage1", defaults=defaults)


def run(options: Stage1Command) -> Path | None:
    """Read what the command names and train; returns the merged file."""
    check_needs(options.config.loop)
    check_hub(options.push_to_hub)
    photos = read_photos(options.data)
    say_what_lr_is(photos)
    teacher, vocabulary = read_teacher(options.teacher, options.tag_lists)
    if options.dry_run:
        config, some = options.config, sample(photos)

        def build(loop: LoopConfig) -> Stage1Task:
            return Stage1Task(replace(config, loop=loop, pool=0, cache_teacher=False), teacher, vocabulary, some)

        show(replace(small_dry_run(build, config.loop), photos=len(photos)))
        return None
    source = f"stage 1, recipe {options.recipe}, teacher {options.teacher.name}, photos {Path(options.data).name}"
    result = train_dape(options.config, teacher, vocabulary, photos, options.out, source=source)
    push(result, options.out, options.push_to_hub)
    return result


def train_dape(
    config: Stage1Config,
    teacher: DAPE,
    vocabulary: Vocabulary,
    photos: Sequence[Photo],
    out: Path,
    *,
    source: str = "stage 1",
) -> Path:
    """Run or resume stage 1.

    Args:
        config: a recipe.
        teacher: the tagger; frozen in place and moved to the device.
        vocabulary: its tags.
        photos: HR photos.
        out: folder of the run; `dape.safetensors` and `dape-lora.safetensors` are written there at the end.
        source: where the result comes from, for its metadata.

    Returns:
        The path of `dape.safetensors`.

    Raises:
        DataError: too few photos, or `out` holds another run.
        SettingsError: the launcher shards the networks.
    """
    task = Stage1Task(config, teacher, vocabulary, photos, pool_folder=out / "pool", teacher_folder=out / "teacher")
    if is_main_process():
        write_skipped(task.crops, out)
    try:
        tensors = train(task, config.loop, out, identity=task.identity())
    finally:
        if task.seen is not None:
            task.seen.write()
    if not is_main_process():
        return out / "dape.safetensors"
    return export(task.trained, tensors, config, vocabulary, out, source=f"{source}, {config.loop.steps} steps")
