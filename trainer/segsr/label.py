"""`python -m trainer.segsr.label`: labels of photos by a segmenter of transformers, where nobody drew any."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from seesr_core.errors import DataError
from seesr_core.runtime.devices import AUTO, choose_device
from seesr_core.segsr.labels import MOST_CLASSES

from ..data.photos import load_photo, read_photos
from ..engine import command
from ..evaluate.pictures import as_picture
from ..evaluate.semantics.segmentation import SEMANTIC, Segmenter
from .classes import FILE, write_classes, write_labels

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Options:
    """Write a label picture for every photo, and what the labels mean."""

    segmenter: str
    """A semantic or universal segmenter of transformers, by the hub's name or a folder."""
    data: str
    """Photos, as the trainers read them."""
    out: Path
    """Folder to write: `NAME.png` for each photo, and `classes.json`."""
    device: str = AUTO
    """Device that it runs on."""


def label(options: Options) -> int:
    """Label all photos that have no label picture yet; returns how many were labelled.

    Raises:
        WeightsError: no segmenter. DataError: one that gives no class maps, or names too many classes.
    """
    segmenter = Segmenter.load(options.segmenter, choose_device(options.device))
    names = segmenter.names
    if SEMANTIC not in segmenter.tasks or sorted(names) != list(range(len(names))) or len(names) > MOST_CLASSES:
        raise DataError(
            f"{options.segmenter} should give class maps of classes numbered from 0 to at most {MOST_CLASSES - 1}; "
            f"it has {len(names)} and can do {', '.join(sorted(segmenter.tasks)) or 'none of our tasks'}."
        )
    write_classes(options.out / FILE, [names[number] for number in range(len(names))])
    made = 0
    for photo in read_photos(options.data):
        target = options.out / f"{photo.path.stem}.png"
        if not target.is_file():
            found = segmenter(as_picture(load_photo(photo)), ()).semantic
            write_labels(target, torch.from_numpy(found))
            made += 1
    log.info("labelled %d photos in %s", made, options.out)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return command.run(lambda: label(tyro.cli(Options, args=argv, prog="python -m trainer.segsr.label")))


if __name__ == "__main__":
    sys.exit(main())
