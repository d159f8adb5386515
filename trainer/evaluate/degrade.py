"""`python -m trainer.evaluate.degrade`."""

import sys

from .testsets.degrade import main

if __name__ == "__main__":
    sys.exit(main())
