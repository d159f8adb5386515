"""`python -m seesr_core`."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        # Importing torch takes seconds in which a person may change their mind.
        from .cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
