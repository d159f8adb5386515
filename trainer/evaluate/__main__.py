"""`python -m trainer.evaluate`."""

import sys

from .folders import main

if __name__ == "__main__":
    sys.exit(main())
