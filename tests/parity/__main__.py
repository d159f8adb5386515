"""`python -m tests.parity DIR [--group NAME] [--backend core|host]`: every golden case recomputed, one line each.

`--backend host` computes what a ComfyUI host can compute, through that host, and leaves the other groups out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from .compare import Comparison

GROUPS = ("unet_controlnet", "pipeline", "dape", "color_fix", "prep", "degradation", "losses")
HOST_GROUPS = ("unet_controlnet", "pipeline")
BACKENDS = {"core": ("groups", GROUPS), "host": ("host", HOST_GROUPS)}
"""Backend → the package that computes it, and its groups."""


def run(
    folder: Path, groups: tuple[str, ...] = GROUPS, *, full: bool = True, backend: str = "core"
) -> Iterator[Comparison]:
    """Every comparison of the groups that `folder` holds; a case that raises becomes a failing line, not an end."""
    package, known = BACKENDS[backend]
    for group in groups:
        if group not in known or not (folder / group).is_dir():
            continue
        try:
            yield from importlib.import_module(f".{package}.{group}", __package__).cases(folder, full=full)
        except Exception as error:  # one broken group must not hide the others
            yield Comparison.wrong(group, "-", type(error).__name__, str(error) or "no message")


def main(argv: list[str] | None = None) -> int:
    """Print the lines and the summary; 0 if there was at least one case and all are within tolerance."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of golden numbers, one subfolder a group")
    parser.add_argument("--group", choices=GROUPS, help="only this group")
    parser.add_argument("--backend", choices=BACKENDS, default="core", help="what computes the cases")
    parser.add_argument("--fast", action="store_true", help="leave full-size networks out")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    if options.backend == "host":
        _prepare_host(parser)
    passed = total = 0
    groups = (options.group,) if options.group else GROUPS
    for comparison in run(options.folder, groups, full=not options.fast, backend=options.backend):
        sys.stdout.write(comparison.line() + "\n")
        sys.stdout.flush()
        total, passed = total + 1, passed + comparison.ok
    sys.stdout.write(f"parity: {passed}/{total} within tolerance\n")
    return 0 if total and passed == total else 1


def _prepare_host(parser: argparse.ArgumentParser) -> None:
    from ..host.locate import import_host, reason_to_skip

    reason = reason_to_skip()
    if reason is not None:
        parser.error(f"the host cannot run: {reason}")
    import_host()


if __name__ == "__main__":
    sys.exit(main())
