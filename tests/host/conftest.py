"""Every test here carries the marker `host` and is skipped, with the reason, where no host can run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import nets
from .locate import host_folder, import_host, reason_to_skip
from .server import Server

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session", autouse=True)
def host() -> Iterator[Path]:
    """The host's folder, importable. Without one: skipped, and a failure in CI."""
    reason = reason_to_skip()
    if reason is not None:
        if host_folder() is None and os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; CI needs one.")
        pytest.skip(reason)
    import_host()
    folder = host_folder()
    assert folder is not None
    yield folder
    # The host's patchers need its modules when they go, and those are gone when Python ends.
    nets.nano_seesr.cache_clear()
    gc.collect()


@pytest.fixture(scope="session")
def server(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running host with the plugin, one for all tests."""
    running = Server(host, tmp_path_factory.mktemp("comfyui"))
    running.put("custom_nodes", "other_models.py", (HERE / "other_models.py").read_bytes())
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    """What the running host knows about every node."""
    info: dict[str, Any] = server.get("/object_info")
    return info
