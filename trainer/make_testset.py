"""`python -m trainer.make_testset`."""

import sys

from .evaluate.testsets.make import main

if __name__ == "__main__":
    sys.exit(main())
