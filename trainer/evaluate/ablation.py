"""`python -m trainer.evaluate.ablation`."""

import sys

from .study.ablation import main

if __name__ == "__main__":
    sys.exit(main())
