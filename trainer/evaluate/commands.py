"""`python -m trainer.evaluate COMMAND`: everything that is measured here, one command each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Union

import tyro

from ..engine import command
from .quality import folders
from .report import photo_pages
from .semantics import dape, grounding
from .semantics import folders as semantics
from .study import ablation, solvers
from .testsets import make, sets

PROG = "python -m trainer.evaluate"
DEFAULT = "folders"
"""What is meant when the first argument is an option."""

COMMANDS: Mapping[str, tuple[type, Callable[[Any], None]]] = {
    "folders": (folders.Options, folders.command),
    "sets": (sets.Options, sets.command),
    "semantics": (semantics.Options, semantics.command),
    "sheet": (photo_pages.Options, photo_pages.command),
    "testset": (make.Options, make.command),
    "degrade": (make.SquareOptions, make.command),
    "dape": (dape.Options, dape.command),
    "grounding": (grounding.Options, grounding.command),
    "ablation": (ablation.Options, ablation.command),
    "solvers": (solvers.Options, solvers.command),
}
"""Options and action of every command. A new one is a line here."""


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out the command that the arguments name; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments.insert(0, DEFAULT)

    def action() -> None:
        options = parse(arguments)
        next(act for kind, act in COMMANDS.values() if kind is type(options))(options)

    return command.run(action)


def parse(arguments: Sequence[str]) -> Any:
    """The options of the command that stands first.

    Raises:
        SettingsError: settings that cannot work.
        SystemExit: arguments that cannot be read, or `--help`.
    """
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, (kind, _) in COMMANDS.items())
    description = f"Measure pictures and models; without a command, `{DEFAULT}` is meant."
    return tyro.cli(Union[kinds], args=arguments, prog=PROG, description=description)  # type: ignore[call-overload]  # noqa: UP007


def door(name: str) -> None:
    """End the process as `COMMAND` does: for modules that are a command's other name."""
    sys.exit(main([name, *sys.argv[1:]]))
