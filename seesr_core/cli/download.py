"""`download`: published weights into a folder or into ComfyUI's folders."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from ..install.download import ABSENT, FAILED, Download, Item
from ..install.manifest import COMFY, DEFAULT_ASSETS, Asset, choose, load_manifest
from ..install.places import Target
from ..runtime.signals import exit_code, how
from .console import say, say_error
from .tables import bytes_bar, say_table, size_text

_ON = ("1", "on", "yes", "true")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its description and options."""
    names = [*load_manifest(), "all"]
    parser.description = (
        "Download the published weights. The same command again continues a broken download and verifies "
        "what is there. HF_ENDPOINT names another hub, HF_TOKEN a login."
    )
    parser.add_argument(
        "--what",
        nargs="+",
        choices=names,
        default=list(DEFAULT_ASSETS),
        metavar="NAME",
        help=f"{', '.join(names)} (default: {' '.join(DEFAULT_ASSETS)}, which make one model)",
    )
    add_target_options(parser, "weights")
    parser.add_argument("--offline", action="store_true", help="use no network: verify what is there")
    parser.add_argument("--list", action="store_true", help="only list what there is, with licences and sources")
    parser.add_argument("--json", action="store_true", help="print a JSON list with an entry for each file")


def add_target_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    """`--to` and `--comfy`, of which one may be given."""
    where = parser.add_mutually_exclusive_group()
    default_path = Path(default) if default else None
    note = f" (default: {default})" if default else ""
    where.add_argument("--to", type=Path, metavar="DIR", default=default_path, help=f"folder for --model{note}")
    where.add_argument("--comfy", type=Path, metavar="PATH", help="ComfyUI's folder: each file into its model folder")


def target_of(arguments: argparse.Namespace) -> Target:
    """The target that the options name."""
    return Target.comfy(arguments.comfy) if arguments.comfy is not None else Target.folder(arguments.to)


def run(arguments: argparse.Namespace) -> int:
    """Execute the command; returns the exit code."""
    assets = choose(load_manifest(), arguments.what)
    target = target_of(arguments)
    if arguments.list:
        _say_assets(assets, target)
        return 0
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    work = Download(target=target, bar=bytes_bar)
    items = work.items(assets)
    work.take_from_cache(items)
    if not (arguments.offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in _ON):
        try:
            work.run(items)
        except KeyboardInterrupt as error:
            say_error(f"error: {how(error)}; what has come is kept, and the same command continues.")
            return exit_code(error)
    if arguments.json:
        say(json.dumps([_entry(item) for item in items], ensure_ascii=False, indent=1))
    else:
        _say_items(items)
        _say_next(items, target)
    return _say_failures(items)


def _say_assets(assets: list[Asset], target: Target) -> None:
    """The manifest for one kind of target."""
    for asset in assets:
        files = target.files(asset)
        say(f"{asset.name}: {asset.title}. Licence: {asset.licence}")
        if asset.unverified:
            say(f"  unverified: {asset.unverified}")
        for source in dict.fromkeys(str(source) for file, _ in files for source in file.sources):
            say(f"  from {source}")
        for file, path in files:
            exact = "" if file.size is not None else "about "
            say(f"  {exact}{size_text(file.expected_bytes)}  {path}")


def _say_items(items: list[Item]) -> None:
    rows = [
        (item.asset.name, size_text(item.bytes), item.state, item.checked_by or "-", item.source or "-", str(item.path))
        for item in items
    ]
    say_table(("asset", "size", "state", "checked by", "source", "where"), rows)


def _say_next(items: list[Item], target: Target) -> None:
    """What to do with what is there."""
    complete = {item.asset.name for item in items} - {item.asset.name for item in items if item.bad}
    if complete & {"seesr", "ram"}:
        where = target.argument if target.layout == COMFY else str(target.root)
        say(f"next, to save room: python -m seesr_core convert {where}")
    if not any(item.bad for item in items):
        say(f"then: python -m seesr_core doctor {target.argument}")


def _say_failures(items: list[Item]) -> int:
    bad = [item for item in items if item.bad]
    for item in items:
        if item.state in (FAILED, ABSENT) or (item.bad and item.reasons):
            level = "error" if item.bad else "note"
            say_error(f"{level}: {item.path.name}: {'; '.join(item.reasons) or 'no source offers it'}")
    if bad:
        say_error(f"error: {len(bad)} of {len(items)} files are not there; the same command tries them again.")
    return 1 if bad else 0


def _entry(item: Item) -> dict[str, Any]:
    return {
        "asset": item.asset.name,
        "path": str(item.path),
        "bytes": item.path.stat().st_size if item.path.is_file() else None,
        "state": item.state,
        "checked_by": item.checked_by or None,
        "source": item.source or None,
        "reasons": list(item.reasons),
        "licence": item.asset.licence,
    }
