"""The whole way of a newcomer, with files of the published sizes: what each command takes, as a Markdown table.

    python -m tools.newcomer [--dir DIR] [--host-python PYTHON] [--steps 2] [--small] [--keep]

A stand-in hub on this machine offers everything that `download` asks for, made by rule. Then come the commands of the
README, each in a process of its own: download, convert, inspect, doctor, upscale; then, with a ComfyUI at
`$COMFYUI_PATH` and a Python that has its requirements, the same files in the host, by the shipped workflow
`3_sd2_base_seesr`. Takes 35 GB of disk and minutes; `--small` takes seconds and leaves the host out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.host.locate import PLUGIN, host_folder
from tests.hub_server import Hub, serve

PHOTO = PLUGIN / "seesr_core" / "nano" / "example.jpg"
SIDE, SMALL_SIDE = 128, 16
DISK = 35e9
Variables = dict[str, str]
_EXACT = ("size", "sha256")
_HOST_SIDE = 64
_NO_TAGS = 10.0
"""Factor on every tag's threshold that no score reaches."""
_PEAK = "NEWCOMER_PEAK"
"""Variable with the name of the file in which a step notes its peak memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a command took."""

    title: str
    """What the command does, as the table says it."""
    seconds: float
    """Wall-clock time."""
    peak: int
    """Bytes of memory at its peak, files that are mapped into it included."""
    left: int
    """Bytes on disk in its folder afterwards."""
    output: str = field(repr=False)
    """What the command printed."""

    def row(self) -> str:
        """The command as a row of the table."""
        return f"| {self.title} | {self.seconds:.0f} s | {self.peak / 1e9:.1f} GB | {self.left / 1e9:.2f} GB |"


class WentWrongError(RuntimeError):
    """A command failed; the message ends in what it said."""


def main() -> None:
    """The command line; `--part` is how the steps' processes are started."""
    parser = argparse.ArgumentParser(prog="python -m tools.newcomer", description="The whole way of a newcomer.")
    parser.add_argument("--dir", type=Path, help="where the files lie meanwhile (a temporary folder)")
    parser.add_argument("--host-python", help="Python with ComfyUI's requirements, for the last step")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps")
    parser.add_argument("--small", action="store_true", help="small networks, without the host")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--part", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        sys.exit(_part(*options.part))
    folder = Path(tempfile.mkdtemp(prefix="newcomer-", dir=options.dir))
    free = shutil.disk_usage(folder).free
    if free < DISK and not options.small:
        folder.rmdir()
        parser.error(f"the files need {DISK / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free: choose another --dir")
    try:
        _tell("| step | time | peak memory | files then |\n|---|---:|---:|---:|")
        for taken in walk(folder, small=options.small, steps=options.steps, host_python=options.host_python):
            _tell(taken.row())
    finally:
        if not options.keep:
            shutil.rmtree(folder)


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def walk(folder: Path, *, small: bool, steps: int = 2, host_python: str | None = None) -> Iterator[Taken]:
    """Make the files in `folder` and go the way; yields what every step took.

    Raises:
        WentWrongError: a step failed.
    """
    shop, weights, manifest = folder / "shop", folder / "weights", folder / "manifest.json"
    _run_part("make", "small" if small else "full", shop, "folders")
    side = SMALL_SIDE if small else SIDE
    photo = _photo(folder / "photo.png", side)
    with _hub(shop, manifest, small=small) as environment:
        yield _seesr(manifest, "`download`", weights, "download", "--to", weights, environment=environment)
    shutil.rmtree(shop)
    yield _seesr(manifest, "`convert`", weights, "convert", weights)
    for file in (weights / "seesr.safetensors", weights / "dape.safetensors"):
        yield _seesr(manifest, f"`inspect {file.name}`", file, "inspect", file)
    yield _seesr(manifest, "`doctor`", weights, "doctor", "--to", weights)
    large, how = folder / "large.png", ("--steps", steps, "--cfg", 5.5, "--dtype", "bf16", "--device", "cpu")
    title = f"`upscale`, {side}² → {4 * side}², {steps} steps in bf16"
    yield _seesr(manifest, title, large, "upscale", photo, large, "--model", weights, *how)
    if host_python and not small:
        yield from _in_the_host(folder, weights, manifest, steps, host_python)


def _seesr(manifest: Path, title: str, place: Path, *words: object, environment: Variables | None = None) -> Taken:
    return _run_part("seesr", manifest, *words, title=title, place=place, environment=environment)


def _in_the_host(folder: Path, weights: Path, manifest: Path, steps: int, python: str) -> Iterator[Taken]:
    """The base as the host's own loader wants it, beside our two converted files, in the shipped workflow."""
    if host_folder() is None:
        raise WentWrongError("There is no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI.")
    models = folder / "host" / "models"
    for kind in ("seesr", "dape"):
        (models / kind).mkdir(parents=True)
        shutil.move(weights / f"{kind}.safetensors", models / kind)
    shutil.rmtree(weights)
    shop = folder / "shop"
    _run_part("make", "full", shop, "single")
    with _hub(shop, manifest, small=False) as environment:
        words = ("download", "--what", "base", "--comfy", models.parent)
        yield _seesr(manifest, "`download --what base --comfy`", models, *words, environment=environment)
    shutil.rmtree(shop)
    title = f"ComfyUI: start, workflow 3, {_HOST_SIDE}² → {4 * _HOST_SIDE}², {steps} steps in bf16"
    yield _run_part("host", models.parent, steps, title=title, place=models, python=python)


def _photo(path: Path, side: int) -> Path:
    from PIL import Image

    with Image.open(PHOTO) as photo:
        photo.convert("RGB").resize((side, side)).save(path)
    return path


@contextmanager
def _hub(shop: Path, manifest: Path, *, small: bool) -> Iterator[Variables]:
    """Inside, everything in `shop` is offered as `manifest` says; gives the variables that lead there."""
    with serve(Hub()) as hub:
        for path in (path for path in shop.rglob("*") if path.is_file()):
            name = path.relative_to(shop).as_posix()
            hub.add_file(name, path)
            hub.digest(name)  # hubs know it beforehand
        manifest.write_text(json.dumps(relaxed(hub.url, small=small)))
        yield {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(shop.parent / "hub-cache")}


def relaxed(url: str, *, small: bool) -> dict[str, Any]:
    """The manifest without the hashes of the published files, its plain URLs on this machine."""
    from seesr_core.install.manifest import MANIFEST

    manifest: dict[str, Any] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    for layout in (layout for asset in manifest["assets"] for layout in asset["layouts"].values()):
        for file in layout["files"]:
            for name in (*_EXACT, *(("parameters",) if small else ())):
                file.pop(name, None)
            for source in file.get("sources", []):
                source["url"] = f"{url}/plain/lists/{file['path']}"
    return manifest


def _run_part(
    *words: object,
    title: str = "",
    place: Path | None = None,
    environment: Variables | None = None,
    python: str = sys.executable,
) -> Taken:
    """Run a step in a process of its own."""
    command = [python, "-m", "tools.newcomer", "--part", *map(str, words)]
    with tempfile.TemporaryDirectory() as told:
        variables = {**os.environ, **(environment or {}), _PEAK: f"{told}/peak"}
        began = time.perf_counter()
        done = subprocess.run(command, cwd=PLUGIN, capture_output=True, text=True, check=False, env=variables)
        seconds = time.perf_counter() - began
        if done.returncode:
            said = (done.stdout + done.stderr)[-3000:]
            raise WentWrongError(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{said}")
        peak = int(Path(variables[_PEAK]).read_text())
    return Taken(title=title, seconds=seconds, peak=peak, left=_size(place) if place else 0, output=done.stdout)


def _size(place: Path) -> int:
    files: Sequence[Path] = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _part(name: str, *words: str) -> int:
    """A step, in its own process, which notes its peak memory."""
    parts: dict[str, Callable[..., int]] = {"make": _make, "seesr": _command, "host": _host}
    code = parts[name](*words)
    note, own = Path(os.environ[_PEAK]), _peak("self")
    note.write_text(str(max(own, int(note.read_text()) if note.exists() else 0)))
    return code


def _peak(process: int | str) -> int:
    """The most memory that a living process ever had, in bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _make(size: str, shop: str, what: str) -> int:
    from . import newcomer_files as files

    sizes = files.published_sizes() if size == "full" else files.small_sizes()
    publish = files.publish_folders if what == "folders" else files.publish_single_file
    publish(Path(shop), sizes)
    return 0


def _command(manifest: str, *words: str) -> int:
    """`python -m seesr_core` with another manifest."""
    from seesr_core.cli import main as cli
    from seesr_core.install.manifest import load_manifest

    load_manifest.__defaults__ = (Path(manifest),)
    return cli.main(words)


def _host(base: str, steps: str) -> int:
    """The shipped workflow for real weights, in a server whose base directory is `base`."""
    from tests.host import graph as graphs
    from tests.host import nano_graphs as nano
    from tests.host.server import Server

    folder = host_folder()
    assert folder is not None
    server = Server(folder, Path(base), flags=("--bf16-unet",))
    server.start()
    try:
        server.put("input", nano.PHOTO, nano.photo_bytes((_HOST_SIDE, _HOST_SIDE)))
        graph = nano.small(graphs.to_api(nano.workflow(3), server.get("/object_info"), check=False))
        nano.nodes_of(graph, "SeeSRScheduler")[0]["steps"] = int(steps)
        # Weights by the rule find a thousand tags in any photo, and the host's text encoder reads them all.
        nano.nodes_of(graph, "SeeSRExtractTags")[0]["threshold"] = _NO_TAGS
        run = server.run(graph, timeout=1800)
        if run.status != "success":
            raise WentWrongError(f"{run.status} at node {run.node}: {run.error}\n{server.tail()}")
        shape = server.picture(run.image_files()[0]).shape
        assert shape == (4 * _HOST_SIDE, 4 * _HOST_SIDE, 3), shape
        Path(os.environ[_PEAK]).write_text(str(_peak(server.pid)))
        return 0
    finally:
        server.stop()


if __name__ == "__main__":
    main()
