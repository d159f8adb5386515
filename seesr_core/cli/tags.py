"""`tags IN`: what the tagger sees on a photo or on all photos of a folder."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..dape import DAPE, Tag, Vocabulary, tagger_input
from ..models import load_tagger
from ..pictures.reading import read_photo
from ..pictures.sizes import to_tensor
from .console import say
from .failures import Failures
from .jobs import plan_reading
from .upscale import add_common_options, given_files


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its description and options."""
    parser.description = "Print the tags of photos with their scores, the strongest first."
    parser.add_argument("source", metavar="IN", type=Path, help="photo or folder")
    parser.add_argument("--threshold", type=float, default=1.0, metavar="X", help="factor on every tag's own threshold")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="language of the tags")
    parser.add_argument("--json", action="store_true", help="print a JSON list with an entry for each photo")
    add_common_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Execute the command; returns the exit code."""
    plan = plan_reading(arguments.source)
    failures, entries = Failures(keep_going=plan.many), []
    dape, vocabulary = load_tagger(arguments.model, device=arguments.device, given=given_files(arguments))
    for photo in (job.source for job in plan.jobs):
        with failures.guard(photo):
            found = _tags(photo, dape, vocabulary, arguments)
            entries.append({"file": str(photo), "tags": [asdict(tag) for tag in found]})
            if not arguments.json:
                say(f"{photo}: {', '.join(f'{tag.name} {tag.score:.2f}' for tag in found) or 'no tags'}")
    if arguments.json:
        say(json.dumps(entries, ensure_ascii=False, indent=1))
    return failures.list(len(plan.jobs))


@torch.no_grad()
def _tags(photo: Path, dape: DAPE, vocabulary: Vocabulary, arguments: argparse.Namespace) -> list[Tag]:
    rgb = read_photo(photo, frame=arguments.frame).rgb
    device = next(dape.parameters()).device
    logits = dape(tagger_input(to_tensor(rgb), dape.config.image_size).to(device)).logits_BN
    (tags,) = vocabulary.select(logits, threshold=arguments.threshold, language=arguments.language)
    return sorted(tags, key=lambda tag: -tag.score)
