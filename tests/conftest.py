"""What tests of several folders share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # before torch is imported: processes side by side share the cores, and so do those that they start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's files, which tests leave as they are."""
    from .tiny_model import write_tiny_model  # not where the host's tests run, which lack its libraries

    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def spoilable(complete: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's files for one test."""
    return Path(shutil.copytree(complete, tmp_path / "model"))
