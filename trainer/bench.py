"""`python -m trainer.bench`, see `trainer.capacity.bench`."""

import sys

from .capacity.bench import main

if __name__ == "__main__":
    sys.exit(main())
