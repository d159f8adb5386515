"""Commands, exit codes, and the one line that an error becomes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..errors import SeeSRError, SettingsError, about_file
from ..runtime.signals import exit_code, how
from .console import log_to_stderr, say_error

FAILED, USAGE = 1, 2
COMMANDS = {
    "upscale": "upscale a photo or a folder of photos",
    "compare": "write a page with a slider between two pictures or two folders",
    "tags": "print the tags of a photo or of a folder of photos",
    "download": "download the published weights",
    "convert": "convert published weights to small safetensors files",
    "inspect": "tell what a weights file is",
    "doctor": "say what is missing, wrong or too large",
}
"""What each command, a module of its name beside this one, is for."""
_EXTRAS = ("diffusers", "transformers", "tqdm", "huggingface_hub", "filelock")


class _Parser(argparse.ArgumentParser):
    """Wrong usage is an error like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see {self.prog} --help)")


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """All commands; options only of the one that is `chosen`, whose modules take long to import."""
    parser = _Parser(prog="seesr", description="Semantics-aware super-resolution of real photos.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, allow_abbrev=False)
        if name == chosen:
            module = import_module(f".{name}", __package__)
            module.add_options(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (something failed), 2 (wrong usage), 130 or 143 (interrupted)."""
    try:
        _quiet_libraries()
        words = sys.argv[1:] if argv is None else list(argv)
        arguments = build_parser(next((word for word in words if not word.startswith("-")), None)).parse_args(words)
        _check_texts(arguments)
        from ..runtime.memory import one_sentence_when_exhausted

        with log_to_stderr(), one_sentence_when_exhausted("close other programs or take a smaller photo or model"):
            code: int = arguments.run(arguments)
        if sys.stdout is not None:
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
        _give_up_output()  # its reader left
        return FAILED
    except OSError as error:
        if error.filename is None:
            _give_up_output()
            return _fail(f"The output cannot be written: {error.strerror or error}.", FAILED)
        return _fail(about_file(error), FAILED)
    except KeyboardInterrupt as error:
        return _fail(f"{how(error)}; no half file was left.", exit_code(error))


def _check_texts(arguments: argparse.Namespace) -> None:
    """Paths may have bytes that are no text; what networks read may not."""
    for name, value in vars(arguments).items():
        if isinstance(value, str) and name != "model" and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise SettingsError(f"--{name.replace('_', '-')} should be text in UTF-8 and is not.")


def _give_up_output() -> None:
    """Nothing more can be written there, not even at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    say_error(f"error: {' '.join(message.split())}")
    return code


def _quiet_libraries() -> None:
    """Their notices are for developers; the variables count at their import, and where the user has not set them."""
    for name in ("diffusers", "transformers"):
        if os.environ.setdefault(f"{name.upper()}_VERBOSITY", "error") == "error":
            logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
