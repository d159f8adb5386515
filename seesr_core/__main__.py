"""`python -m seesr_core`."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (the process's own if None); returns the exit code."""
    try:
        # Importing what a command needs takes seconds in which a person may change their mind.
        from .cli.main import main as run

        return run(argv)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
