"""A real ComfyUI server for the tests: started once on a free loopback port, with a base directory of its own.

The plugin is linked into that directory's `custom_nodes`; the host's own folders are never touched.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .locate import PLUGIN

if TYPE_CHECKING:
    import aiohttp

FOLDER = "comfyui-seesr"
"""The plugin's folder in `custom_nodes`, as the registry names it."""
_FLAGS = ("--cpu", "--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")
_ENDS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}
_CLIENT = "seesr-tests"
_TEXT = 3


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of one prompt."""

    prompt_id: str
    status: str
    """success, error, interrupted, or refused (the host's validation said no)."""
    error: str = ""
    """The host's message, empty on success."""
    node: str = ""
    """Id of the node that failed."""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each node's user interface shows, by node id: images, text."""

    def image_files(self, node: str | None = None) -> list[dict[str, str]]:
        """The pictures of one node, or of all, as the host names them."""
        shown = [self.outputs.get(node, {})] if node is not None else list(self.outputs.values())
        return [file for output in shown for file in output.get("images", [])]


class ServerError(RuntimeError):
    """The server did not come up or went away; the message ends with its log's tail."""


class Server:
    """One host process. `start` and `stop` bracket its life; `run` sends a graph in API form and waits."""

    def __init__(self, host: Path, base: Path, *, python_path: str = "", flags: Sequence[str] = ()) -> None:
        """`base` becomes the base directory; `python_path` goes before everything else (an older host's packages);
        `flags` are the host's own."""
        self.host, self.base = host, base
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        self._python_path, self._flags = python_path, flags
        self._process: subprocess.Popen[bytes] | None = None
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._news = threading.Condition()

    def start(self, timeout: float = 240.0) -> None:
        """Link the plugin, start the process, wait until it answers and listen to its events."""
        plugins = self.base / "custom_nodes"
        plugins.mkdir(parents=True, exist_ok=True)
        if not (plugins / FOLDER).exists():
            (plugins / FOLDER).symlink_to(PLUGIN, target_is_directory=True)
        paths = [path for path in (self._python_path, os.environ.get("PYTHONPATH", "")) if path]
        command = [sys.executable, "main.py", *_FLAGS, *self._flags]
        command += ["--port", str(self.port), "--base-directory", str(self.base)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.host,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._wait_until_up(timeout)
        listening = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._listen(listening)), daemon=True).start()
        if not listening.wait(30):
            raise ServerError(f"No event channel.\n{self.tail()}")

    def stop(self) -> None:
        """End the process that `start` made."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def tail(self, characters: int = 3000) -> str:
        """The end of the server's log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def get(self, path: str) -> Any:
        """JSON of a GET request."""
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        """Body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=120) as answer:
            return bytes(answer.read())

    def post(self, path: str, data: dict[str, Any]) -> Any:
        """JSON of a POST request; None for an empty answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def submit(self, graph: dict[str, Any]) -> str | Run:
        """Queue a graph in API form: its id, or a refused run."""
        try:
            return str(self.post("/prompt", {"prompt": graph, "client_id": _CLIENT})["prompt_id"])
        except urllib.error.HTTPError as refusal:
            return _refused(json.loads(refusal.read()))

    def run(self, graph: dict[str, Any], timeout: float = 300.0) -> Run:
        """Queue a graph in API form and wait for its end."""
        queued = self.submit(graph)
        return queued if isinstance(queued, Run) else self.wait(queued, timeout)

    def refusals(self, graph: dict[str, Any]) -> str:
        """What the host's validation says of a graph, of all of it or of the outputs that it leaves out; the others are
        run to their end."""
        try:
            answer = self.post("/prompt", {"prompt": graph, "client_id": _CLIENT})
        except urllib.error.HTTPError as refusal:
            return _refused(json.loads(refusal.read())).error
        self.wait(answer["prompt_id"])
        return _refused(answer).error

    def wait(self, prompt_id: str, timeout: float = 300.0) -> Run:
        """The end of a queued prompt."""
        kind, data = self.wait_for(prompt_id, tuple(_ENDS), timeout)
        history = self._history(prompt_id)
        message = f"{data.get('exception_type', '')}: {data.get('exception_message', '')}" if "error" in kind else ""
        return Run(
            prompt_id=prompt_id,
            status=_ENDS[kind],
            error=message,
            node=str(data.get("node_id") or ""),
            outputs=history.get("outputs", {}),
        )

    def wait_for(self, prompt_id: str, kinds: tuple[str, ...], timeout: float = 300.0) -> tuple[str, dict[str, Any]]:
        """The first event of one of these kinds that concerns this prompt."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                for kind, data in self._events:
                    if kind in kinds and data.get("prompt_id") == prompt_id:
                        return kind, data
                if self._process is None or self._process.poll() is not None:
                    raise ServerError(f"The server ended.\n{self.tail()}")
                if time.monotonic() > deadline:
                    raise ServerError(f"None of {kinds} within {timeout:.0f} s.\n{self.tail()}")
                self._news.wait(1.0)

    def texts(self, node: str) -> list[str]:
        """What was shown on a node so far, in every run."""
        with self._news:
            return [data["text"] for name, data in self._events if name == "text" and data["node"] == node]

    def events(self, prompt_id: str, kind: str) -> list[dict[str, Any]]:
        """All events of a kind so far that concern this prompt."""
        with self._news:
            return [data for name, data in self._events if name == kind and data.get("prompt_id") == prompt_id]

    def interrupt(self) -> None:
        """Ask the host to stop what it runs now."""
        self.post("/interrupt", {})

    def forget(self) -> None:
        """Drop the host's models and cached results, so that the next run computes everything."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def put(self, folder: str, name: str, data: bytes) -> None:
        """Write a file below the base directory, such as a photo into `input` or a LoRA into `models/loras`."""
        target = self.base / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def picture(self, file: dict[str, str]) -> np.ndarray:
        """A picture that a node showed or saved: (H, W, 3) uint8."""
        data = self.get_bytes("/view?" + urllib.parse.urlencode(file))
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def _wait_until_up(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        self.stop()
        raise ServerError(f"The server did not answer.\n{self.tail()}")

    async def _listen(self, listening: threading.Event) -> None:
        import aiohttp

        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={_CLIENT}", max_msg_size=0) as channel,
        ):
            listening.set()
            async for message in channel:
                self._note(message)

    def _note(self, message: aiohttp.WSMessage) -> None:
        with self._news:
            if isinstance(message.data, str):
                event = json.loads(message.data)
                self._events.append((event["type"], event["data"]))
            elif isinstance(message.data, bytes):
                self._events.append(_binary_event(message.data))
            self._news.notify_all()

    def _history(self, prompt_id: str) -> dict[str, Any]:
        """The host writes the history shortly after it sent the last event."""
        for _ in range(100):
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id])
            time.sleep(0.05)
        raise ServerError(f"No history of {prompt_id}.\n{self.tail()}")


def _refused(answer: dict[str, Any]) -> Run:
    """A run that the host's validation turned down: all its sentences in one."""
    error = answer.get("error", {})
    parts = [f"{error.get('message', '')} {error.get('details', '')}"] if isinstance(error, dict) else [str(error)]
    nodes = answer.get("node_errors") or {}
    for found in nodes.values():
        parts += [f"{each['message']}: {each['details']}" for each in found["errors"]]
    return Run(prompt_id="", status="refused", error="\n".join(parts).strip(), node=next(iter(nodes), ""))


def _binary_event(data: bytes) -> tuple[str, dict[str, Any]]:
    """A preview, or a text on a node: the kind, then the length of the node's id, the id, the text."""
    kind, length = struct.unpack(">II", data[:8])
    if kind != _TEXT:
        return "preview", {"bytes": len(data)}
    return "text", {"node": data[8 : 8 + length].decode(), "text": data[8 + length :].decode()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
