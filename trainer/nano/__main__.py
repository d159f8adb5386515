"""`python -m trainer.nano --photos LIST --out DIR`: the embedded small model, from photos to the files that ship."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from seesr_core.errors import SettingsError

from ..engine import command
from ..engine.processes import process_count
from .build import Builder
from .recipe import NANO_RECIPES, NanoConfig


@dataclass(kw_only=True)
class NanoCommand(command.RecipeCommand):
    """Build the small model. Parts that are done are skipped and an interrupted one is resumed."""

    photos: Path
    """Photos with their words: a .jsonl list with `file` and `tags`."""
    out: Path
    """Folder of the run; the model ends up in its folder `model`."""
    config: Annotated[NanoConfig, command.SETTINGS]
    """Settings that override the recipe's."""
    tag_lists: Path | None = None
    """Folder with RAM's public tag lists: a larger vocabulary for prompts, and Chinese names of tags."""
    init: Path | None = None
    """Model folder to go on from: its tagger, U-Net, text encoder, ControlNet and RCA are trained further."""
    autoencoder: Path | None = None
    """Autoencoder to take instead of training one: an `autoencoder.safetensors` of a run, or a base file."""
    teacher: Path | None = None
    """Super-resolution network (any file that spandrel loads) that the parts from few-steps on learn from, too."""
    parts: tuple[str, ...] = ()
    """Build only these: autoencoder, tagger, dape, tags, prior, control, few-steps, decoder, texture, package."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: _run(command.parse(NanoCommand, NANO_RECIPES, argv, prog="python -m trainer.nano")))


def _run(options: NanoCommand) -> None:
    if process_count() > 1:
        raise SettingsError("The small model is built by one process; start it without a launcher.")
    given = {"autoencoder": options.autoencoder, "teacher": options.teacher}
    builder = Builder(options.config, options.photos, options.out, options.tag_lists, options.init, **given)
    builder.build(options.parts)


if __name__ == "__main__":
    sys.exit(main())
