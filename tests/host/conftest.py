"""Every test here carries the marker `host` and is skipped, with the reason, where no host can run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    nets.forget()
    gc.collect()


@pytest.fixture(scope="module")
def model() -> Any:
    """The shipped U-Net, never patched itself."""
    return nets.nano_model()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    """One small photo, and what goes with it."""
    return nets.nano_inputs(size=8)


@pytest.fixture(scope="session")
def server(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running host with the plugin, one for all tests."""
    with _running(Server(host, tmp_path_factory.mktemp("comfyui"))) as server:
        yield server


@pytest.fixture(scope="session")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The oldest supported host, running. An empty package stands in for its templates, which the tests do not need."""
    place = Path(os.environ.get("COMFYUI_OLDEST") or Path.home() / "comfy" / "ComfyUI-0.3.64")
    if not (place / "main.py").is_file():
        pytest.skip("no second host at $COMFYUI_OLDEST or ~/comfy/ComfyUI-0.3.64")
    base = tmp_path_factory.mktemp("oldest")
    stand_in = base / "packages" / "comfyui_workflow_templates"
    (stand_in / "templates").mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    with _running(Server(place, base, python_path=str(base / "packages"))) as server:
        yield server


@pytest.fixture(scope="session", params=["server", "oldest"])
def each_server(request: pytest.FixtureRequest) -> Server:
    """The newest host, then the oldest."""
    found: Server = request.getfixturevalue(request.param)
    return found


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    server.put("custom_nodes", "other_models.py", (HERE / "other_models.py").read_bytes())
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    """What the running host knows about every node."""
    info: dict[str, Any] = server.get("/object_info")
    return info
