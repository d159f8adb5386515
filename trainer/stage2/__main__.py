"""`python -m trainer.stage2`."""

import sys

from .task import main

if __name__ == "__main__":
    sys.exit(main())
