"""`inspect FILE`: what a weights file is, in a screenful."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import WeightsError
from ..install.inspection import Inspection, as_json, damage, files_of, inspect_file
from .console import say, say_error
from .tables import bytes_bar, size_text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its description and options."""
    parser.description = "Tell what a weights file is, from its content, without loading it whole."
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="weights file, or folder with some")
    parser.add_argument("--hash", action="store_true", help="also compute the sha256, look it up, and tell damage")
    parser.add_argument("--json", action="store_true", help="print a JSON list with an entry for each file")


def run(arguments: argparse.Namespace) -> int:
    """Execute the command; returns the exit code."""
    paths = [file for path in arguments.files for file in files_of(path)]
    found: list[Inspection] = []
    failed: dict[Path, str] = {}
    for path in paths:
        try:
            with bytes_bar(f"hashing {path.name}") as progress:
                found.append(inspect_file(path, hashed=arguments.hash, progress=progress))
        except WeightsError as error:
            if len(paths) == 1:
                raise
            failed[path] = str(error)
    if arguments.json:
        broken = [{"path": str(path), "error": message} for path, message in failed.items()]
        say(json.dumps([*(as_json(item) for item in found), *broken], ensure_ascii=False, indent=1))
    else:
        for item in found:
            _say(item)
    damaged = [damage(item.path) for item in found if item.undamaged is False]
    for message in (*failed.values(), *damaged):
        say_error(f"error: {message}")
    return 1 if failed or damaged else 0


def _say(item: Inspection) -> None:
    say(str(item.path))
    container = "safetensors" if item.container == "safetensors" else "pickle, opened without running its code"
    types = ", ".join(f"{count / max(item.parameters, 1):.0%} {name}" for name, count in item.dtypes.items() if count)
    lines = {
        "what": item.label,
        "file": f"{container}, {size_text(item.bytes)}",
        "parameters": f"{item.parameters:,} in {item.tensors} tensors; {types or 'none'}",
        "sizes": ", ".join(f"{name} {value}" for name, value in item.sizes.items()),
        "fits with": item.fits,
        "evidence": "; ".join(item.evidence),
        "sha256": f"{item.sha256} ({item.known_as or 'of no published file that is known'})" if item.sha256 else "",
        **item.metadata,
    }
    for name, text in lines.items():
        if text:
            say(f"  {name:<13}{text}")
