"""Commands, exit codes, and the one line that an error becomes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import SeeSRError, SettingsError
from ..runtime.memory import one_sentence_when_exhausted
from . import convert, doctor, download, inspect, tags, upscale
from .console import log_to_stderr, say_error

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_EXTRAS = ("diffusers", "transformers", "tqdm", "huggingface_hub", "filelock")


class _Parser(argparse.ArgumentParser):
    """Wrong usage is an error like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = _Parser(prog="seesr", description="Semantics-aware super-resolution of real photos.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    upscale.add_command(commands)
    tags.add_command(commands)
    for command in (download, convert, inspect, doctor):
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (something failed), 2 (wrong usage) or 130 (interrupted)."""
    try:
        arguments = build_parser().parse_args(argv)
        _quiet_libraries()
        with log_to_stderr(), one_sentence_when_exhausted("close other programs or take a smaller photo or model"):
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except SettingsError as error:
        return _fail(str(error), USAGE)
    except SeeSRError as error:
        return _fail(str(error), FAILED)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return _fail(f"This needs the package {error.name}: pip install 'comfyui-seesr[cli]'.", FAILED)
    except BrokenPipeError:
        # The reader of our output left; nothing more can be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return _fail("Interrupted; no half file was left.", INTERRUPTED)


def _fail(message: str, code: int) -> int:
    say_error(f"error: {' '.join(message.split())}")
    return code


def _quiet_libraries() -> None:
    """Their notices are for developers; the variables count at their import, and where the user has not set them."""
    for name in ("diffusers", "transformers"):
        if os.environ.setdefault(f"{name.upper()}_VERBOSITY", "error") == "error":
            logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
