"""`python -m trainer.evaluate.dape`."""

import sys

from .semantics.dape import main

if __name__ == "__main__":
    sys.exit(main())
