"""`python -m trainer.evaluate`."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["semantics"]:
        from .semantics.folders import main as semantics

        sys.exit(semantics(sys.argv[2:]))
    if sys.argv[1:2] == ["sets"]:
        from .testsets.sets import main as sets

        sys.exit(sets(sys.argv[2:]))
    from .quality.folders import main

    sys.exit(main())
