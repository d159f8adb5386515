"""Where the numbers of the published implementation lie, for tests that compare with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def find_golden() -> Path | None:
    """The folder named by $SEESR_GOLDEN, else `../shared/golden` beside the project, else None."""
    candidates = [Path(os.environ["SEESR_GOLDEN"])] if "SEESR_GOLDEN" in os.environ else []
    candidates.append(ROOT.parent / "shared" / "golden")
    return next((path for path in candidates if path.is_dir()), None)


def golden_dir() -> Path:
    """The folder of golden numbers; skips the calling test without one, fails it where CI=true."""
    folder = find_golden()
    if folder is None:
        reason = "golden numbers not found: set SEESR_GOLDEN to their folder"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
