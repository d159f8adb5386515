"""`python -m seesr_core`."""

import os
import sys
from collections.abc import Sequence

from .runtime.signals import exit_code, terminable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (the process's own if None); returns the exit code."""
    _occupy_standard_streams()
    try:
        with terminable() as asked:
            # Importing what a command needs takes seconds in which a person may change their mind.
            from .cli.main import main as run

            code = run(argv)
            return code and (asked.code or code)
    except KeyboardInterrupt as error:
        return exit_code(error)


def _occupy_standard_streams() -> None:
    """A stream that the caller closed leaves its number to the next file, and what libraries print would go there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    sys.exit(main())
