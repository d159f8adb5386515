"""`python -m trainer.scale`, see `trainer.capacity.scale`."""

import sys

from .capacity.scale import main

if __name__ == "__main__":
    sys.exit(main())
