"""The command line that the stages share: a recipe gives the defaults, a TOML file and flags override settings."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import tyro

from seesr_core.cli.console import printable
from seesr_core.errors import SeeSRError, SettingsError, about_file
from seesr_core.runtime.signals import exit_code, how, terminable

from .processes import process_count
from .settings import overridden, read_toml

log = logging.getLogger(__name__)

Command = TypeVar("Command")
Config = TypeVar("Config")

SETTINGS = tyro.conf.arg(name="")
"""Annotates the field `config` of a command: its settings become flags without a prefix."""


@dataclass(kw_only=True)
class RecipeCommand:
    """What every command has that runs a recipe; a field `config` with the recipe's settings joins it."""

    recipe: str
    """Name of the recipe."""
    settings: Path | None = None
    """TOML file whose keys override the recipe's; flags override the file."""


@dataclass(kw_only=True)
class StageCommand(RecipeCommand):
    """What both stages' commands have."""

    out: Path
    """Folder of the run."""
    dry_run: bool = False
    """Print parameters, memory, images and hours, and stop."""


@dataclass(kw_only=True)
class UploadingCommand(StageCommand):
    """A stage's command whose result can go to the hub."""

    push_to_hub: str = ""
    """Repository on the hub, OWNER/NAME, that the result is uploaded to with a card when the run is over."""


# The help text joins lines; a topic of a recipe's docstring ("Hardware: …") is to start a line of its own.
_TOPICS = re.compile(r"\n(?=[A-Z][a-z]+: )")


def parse(
    command: type[Command],
    recipes: Mapping[str, Callable[[], Any]],
    argv: Sequence[str] | None,
    *,
    prog: str,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Command:
    """Fill `command`, a dataclass with `recipe`, `settings` and `config`, from the arguments.

    Every other field without a default is required, but for those that the recipe has in `defaults`; the fields of
    `config` are flags of their own (`--loop.steps 100`). The recipe comes first, over it the TOML file of `--settings`,
    over that the flags.

    Raises:
        SettingsError: an unknown recipe or setting, or settings that cannot work.
        SystemExit: arguments that cannot be read, or `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--settings", type=Path)
    chosen, _ = first.parse_known_args(arguments)
    name = chosen.recipe
    config = get_recipe(recipes, name or next(iter(recipes)))
    if chosen.settings:
        config = overridden(config, read_toml(chosen.settings), chosen.settings)
    required = {f.name: tyro.MISSING for f in fields(command) if f.default is MISSING}  # type: ignore[arg-type]
    given = (defaults or {}).get(name or "", {})
    default = command(**{**required, **given, "recipe": name or tyro.MISSING, "config": config})
    description = f"{inspect.getdoc(command)}\n\n{_described(recipes, name)}"
    return tyro.cli(command, args=arguments, default=default, prog=prog, description=description)


def get_recipe(table: Mapping[str, Callable[[], Config]], name: str) -> Config:
    """A fresh configuration of the recipe `name`.

    Raises:
        SettingsError: there is no such recipe; the message has the nearest name.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else "Choose one of them."
        raise SettingsError(f"There is no recipe {name!r}; there are {', '.join(table)}. {hint}")
    return table[name]()


def _described(recipes: Mapping[str, Callable[[], Any]], chosen: str | None) -> str:
    """Every recipe in one line, or all about the chosen one."""
    if chosen:
        return _TOPICS.sub("\n\n", f"Recipe {chosen}: {inspect.getdoc(recipes[chosen])}")
    return "\n\n".join(f"Recipe {name}: {(inspect.getdoc(r) or '').splitlines()[0]}" for name, r in recipes.items())


def run(action: Callable[[], object]) -> int:
    """Carry out a command; what a person can act on becomes one line and exit status 1, Ctrl-C becomes 130.

    A reader that leaves early, such as `head`, ends it silently.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for handler in logging.root.handlers:
        handler.addFilter(_make_printable)
    try:
        # Where there are several processes their launcher ends them by SIGTERM, also those that wait for each other.
        with contextlib.nullcontext() if process_count() > 1 else terminable():
            action()
    except SeeSRError as error:
        log.error("%s", error)
        return 1
    except KeyboardInterrupt as error:
        log.error("%s; the same command goes on from the last checkpoint.", how(error))
        return exit_code(error)
    except BrokenPipeError:
        # The reader of our output left; nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        log.error("%s", about_file(error))
        return 1
    return 0


def _make_printable(record: logging.LogRecord) -> bool:
    """Words of files in a message are not to command the terminal."""
    record.msg, record.args = printable(record.getMessage()), None
    return True
