"""What SeeSR costs inside ComfyUI, as Markdown tables.

    python -m tools.bench [--sides 512 1024 2048 4096] [--steps 2] [--tile 512] [--patience 1800]

Seconds and memory against the image's side, tiled and not, each row in a process of its own: what the process held just
before sampling (weights, photo, upscaled photo, latents), its peak while sampling, and over everything. A row that does
not end in time keeps what is known of it. "nodes" is the graph of the small nodes, which hand pictures on as the host's
float IMAGE; the other rows do what SeeSR Upscale does, which keeps 8 bits. Then what the plugin adds
to the host's start; U-Net calls per step; and the price of RCA and ControlNet beside their arithmetic. Runs the small
model that comes along, on the GPU if the host finds one. Needs a ComfyUI at `$COMFYUI_PATH` and its requirements.
"""

from __future__ import annotations

import argparse
import importlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from tests.host.locate import PLUGIN, host_folder, import_host, load_plugin, plugin

from .peak import Peak

NANO = PLUGIN / "seesr_core" / "nano"
_CFG, _SCALE = 5.5, 4
_START_BUDGET_S = 0.5
_KINDS = ("tiled", "nodes", "untiled")
_BEFORE_PLUGINS = ("nodes", "comfy_extras.nodes_custom_sampler", "comfy_extras.nodes_canny", "comfy_api.latest")
"""What the host has imported before it turns to plugins, as far as it matters here."""


@dataclass(kw_only=True, slots=True)
class Row:
    """One run from photo to finished picture."""

    device: str = ""
    held_mib: float = 0.0
    """Before sampling: weights, and the pictures themselves where they lie in the same memory."""
    sampling_s: float = 0.0
    """Sampling alone; 0 if it did not end."""
    sampling_busy_s: float = 0.0
    """Processor time of the sampling, over all threads: what other work on the machine does not change."""
    sampling_mib: float = 0.0
    """Peak of the process (CPU) or of the allocator (GPU) while sampling."""
    total_s: float = 0.0
    """Everything after loading; 0 if it did not end."""
    total_busy_s: float = 0.0
    """Processor time of everything after loading."""
    total_mib: float = 0.0
    """Peak of memory over everything."""


def main() -> None:
    """Command line; `--part` is how the rows' processes are started."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="What SeeSR costs inside ComfyUI.")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="sides of the result in pixels"
    )
    parser.add_argument("--steps", type=int, default=2, help="sampling steps of each run")
    parser.add_argument("--tile", type=int, default=512, help="tile size in pixels")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS), help="which rows of each side")
    parser.add_argument("--sampling-only", action="store_true", help="draw latents instead of encoding, do not decode")
    parser.add_argument("--patience", type=float, default=1800, help="seconds after which a row is stopped")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if host_folder() is None:
        parser.error("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    if options.part:
        name, *numbers = options.part
        _tell(json.dumps(_PARTS[name](*map(int, numbers))))
        return
    alone = options.sampling_only
    _sizes(options.sides, options.kinds, options.steps, options.tile, options.patience, alone=alone)
    _start()
    _calls()
    _price()


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "tools.bench", "--part", *map(str, words)]


def _part(*words: Any) -> Any:
    """The JSON that a part prints as its last line, run in a fresh process."""
    done = subprocess.run(_command(*words), cwd=PLUGIN, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _sizes(sides: list[int], kinds: list[str], steps: int, tile: int, patience: float, *, alone: bool = False) -> None:
    _tell(f"{steps} steps, CFG {_CFG}, tiles of {tile} px one at a time\n")
    _tell("| side px | kind | device | before MiB | sampling s (processor) | peak MiB | all s (processor) | peak MiB |")
    _tell("|---:|---|---|---:|---:|---:|---:|---:|")
    rows: dict[tuple[str, int], Row] = {}
    for side in sides:
        for kind in kinds:
            flags = (int(kind == "nodes"), int(alone))
            row, why = _one_row(patience, side, steps, tile if kind != "untiled" else 0, *flags)
            rows[kind, side] = row
            sampling = f"{row.sampling_s:.1f} ({row.sampling_busy_s:.1f}) | {row.sampling_mib:.0f}"
            everything = f"{row.total_s:.0f} ({row.total_busy_s:.0f}) | {row.total_mib:.0f}"
            shown = [
                text if done else f"{why} |" for text, done in ((sampling, row.sampling_s), (everything, row.total_s))
            ]
            _tell(f"| {side} | {kind} | {row.device} | {row.held_mib:.0f} | {' | '.join(shown)} |")
    for kind in kinds:
        _compare(kind, rows.get((kind, tile)), rows.get((kind, max(sides))))


def _compare(kind: str, one: Row | None, most: Row | None) -> None:
    """How far the largest picture's sampling lies above that of one tile."""
    if one is None or most is None or one is most or not (one.sampling_mib and most.sampling_mib):
        return
    held = most.held_mib - one.held_mib
    _tell(
        f"\n{kind}, peak of sampling the largest over that of one tile: {most.sampling_mib / one.sampling_mib:.2f}; "
        f"less the {held:.0f} MiB that the larger pictures took before: "
        f"{(most.sampling_mib - held) / one.sampling_mib:.2f}; sampling itself adds "
        f"{most.sampling_mib - most.held_mib:.0f} MiB instead of {one.sampling_mib - one.held_mib:.0f}"
    )


def _one_row(patience: float, *words: int) -> tuple[Row, str]:
    """What a row's process found within `patience` seconds, and why the rest is missing."""
    why = f"not in {patience:.0f} s"
    try:
        done = subprocess.run(_command("row", *words), cwd=PLUGIN, capture_output=True, timeout=patience, check=False)
        output = done.stdout
        if done.returncode:
            why = (done.stderr.decode(errors="replace").strip().splitlines() or [f"killed: {done.returncode}"])[-1][:80]
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
    told = output.decode().strip().splitlines()
    row = Row(**json.loads(told[-1])) if told else Row()
    return row, "not run" if row.sampling_s and words[-1] else why


def _start() -> None:
    seconds, busy = (
        statistics.median(column) for column in zip(*(_part("start").values() for _ in range(3)), strict=True)
    )
    verdict = "within" if seconds <= _START_BUDGET_S else "above"
    added = f"{seconds:.2f} s ({busy:.2f} s of processor time)"
    _tell(f"\nThe plugin adds {added} to the host's start, {verdict} {_START_BUDGET_S} s; sockets were blocked.")


def _calls() -> None:
    found = _part("calls", 4)
    what = f"{found['steps']} steps with positive and negative prompt"
    _tell(f"\nU-Net calls for {what}: {found['calls']}, each with a batch of {found['batch']}.")


def _price() -> None:
    found = _part("price", 64)
    _tell("\n| one call at 512 px, both prompts | ms | G multiply-adds |")
    _tell("|---|---:|---:|")
    for name in ("bare", "seesr"):
        _tell(f"| {name} | {found[name]['ms']:.0f} | {found[name]['gmac']:.2f} |")
    time_ratio, work_ratio = (found["seesr"][key] / found["bare"][key] for key in ("ms", "gmac"))
    _tell(f"\nSeeSR over the bare U-Net: time × {time_ratio:.2f}, arithmetic × {work_ratio:.2f}")


@dataclass(slots=True)
class Loaded:
    """The embedded model in the host's own objects."""

    model: Any
    clip: Any
    vae: Any
    dape: Any
    seesr: Any


def _load(*, allow_gpu: bool = True) -> Loaded:
    _host(allow_gpu)
    load_plugin()
    plugin("nodes")
    import comfy.sd

    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(NANO / "checkpoints" / "seesr-nano.safetensors"))
    dape = plugin("nodes.host.dape").load_dape(NANO / "dape" / "dape-nano.safetensors")
    seesr = plugin("nodes.host.seesr_model").load_seesr_model(NANO / "seesr" / "seesr-nano-control.safetensors")
    return Loaded(model, clip, vae, dape, seesr)


def _host(allow_gpu: bool) -> None:
    """Import the host with a base directory of its own, on the GPU if there is one."""
    import torch

    import_host()
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = not (allow_gpu and torch.cuda.is_available())
    args.base_directory = tempfile.mkdtemp(prefix="comfyui-")
    sys.path.insert(0, str(host_folder()))


def _row(side: int, steps: int, tile: int, floats: int, alone: int) -> dict[str, Any]:
    """A photo to a square picture of `side` pixels; `tile` 0 is untiled. What is known is told after every phase."""
    import torch

    loaded = _load()
    photo = torch.rand(1, side // _SCALE, side // _SCALE, 3, generator=torch.Generator().manual_seed(0))
    row = Row(device="cuda" if torch.cuda.is_available() else "cpu")

    def note(peak: Peak) -> None:
        row.held_mib, row.sampling_mib = peak.held, peak.mib
        row.sampling_s, row.sampling_busy_s = peak.seconds, peak.busy
        _tell(json.dumps(asdict(row)))

    with torch.inference_mode():
        _run(loaded, photo[:, :16, :16], 1, 0)  # loads weights and warms up
        with Peak() as whole:
            _run(loaded, photo, steps, tile, Peak(note), floats=bool(floats), alone=bool(alone))
    if not alone:
        row.total_s, row.total_busy_s, row.total_mib = whole.seconds, whole.busy, max(whole.mib, row.sampling_mib)
    return asdict(row)


def _run(
    loaded: Loaded,
    photo_BHWC: Any,
    steps: int,
    tile: int,
    watch: Peak | None = None,
    *,
    floats: bool = False,
    alone: bool = False,
) -> Any:
    """What SeeSRUpscale does, with the sampling watched.

    `floats`: with the pictures that nodes exchange. `alone`: without the autoencoder.
    """
    image, latent, tiled = (plugin(f"nodes.{name}") for name in ("image", "latent", "tiled"))
    upscale, vae = plugin("nodes.upscale"), plugin("nodes.host.vae")
    prepared = (image.prepare_images if floats else image.prepare_levels)(photo_BHWC, scale=_SCALE, min_size=0)
    model, positive, negative = _applied(loaded, photo_BHWC, prepared)
    sigmas = latent.schedule_sigmas(model, steps=steps)
    if alone:
        noise, start = latent.LRENoise.for_model(model, sigmas, seed=0), {"samples": _drawn(prepared.shape)}
    else:
        noise, start = latent.latent_init(model, loaded.vae, prepared, sigmas, seed=0)
    if tile:
        settings = tiled.TileSettings.from_pixels(tile, 32, tile_batch=1)
        model = tiled.tile_model(model, settings)
    with watch or nullcontext():
        sampler = upscale.comfy.samplers.sampler_object("ddpm")
        sampled, _ = tiled.sample(model, positive, negative, noise, sampler, sigmas, start, cfg=_CFG)
    if alone:
        return None
    decoded = vae.decode_latent(loaded.vae, sampled["samples"])
    return image.finish_images(decoded, prepared, photo_BHWC, scale=_SCALE, color_fix="adain")


def _drawn(shape_BHWC: Any) -> Any:
    """A latent for pictures of this shape, spread about as the autoencoder's."""
    import torch

    count, height, width, _ = shape_BHWC
    return 5 * torch.randn(count, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))


def _applied(loaded: Loaded, photo_BHWC: Any, prepared_BHWC: Any) -> tuple[Any, Any, Any]:
    """MODEL, positive and negative with SeeSR in them."""
    upscale = plugin("nodes.upscale")
    prompts = [
        [upscale.encode_text(loaded.clip, text)] for text in ("clean, high-resolution, 8k", "dotted, noise, blur")
    ]
    soft = loaded.dape.read(photo_BHWC).tokens_BLD
    applied: tuple[Any, Any, Any] = plugin("nodes.apply").apply_seesr(
        loaded.model, *prompts, loaded.seesr, soft, prepared_BHWC
    )
    return applied


def _start_time() -> dict[str, Any]:
    """Seconds to import the plugin and ask for its nodes after the host has imported itself, sockets blocked."""
    import asyncio

    _host(allow_gpu=False)
    for name in _BEFORE_PLUGINS:
        importlib.import_module(name)
    loop = asyncio.new_event_loop()
    socket.socket = _blocked  # type: ignore[assignment, misc]
    socket.create_connection = _blocked
    began, busy = time.perf_counter(), time.process_time()

    async def ask() -> list[Any]:
        extension = await load_plugin().comfy_entrypoint()
        return [node.GET_NODE_INFO_V1() for node in await extension.get_node_list()]

    described = loop.run_until_complete(ask())
    assert len(described) == 18
    return {"seconds": time.perf_counter() - began, "busy": time.process_time() - busy}


def _blocked(*_: Any, **__: Any) -> Any:
    raise AssertionError("the plugin touched the network while it was imported")


def _count_calls(steps: int) -> dict[str, Any]:
    """U-Net calls of a run with guidance."""
    import torch

    loaded = _load(allow_gpu=False)
    batches: list[int] = []
    with torch.inference_mode(), _counted(loaded.model.model.diffusion_model, batches):
        _run(loaded, torch.rand(1, 32, 32, 3), steps, 0)
    return {"steps": steps, "calls": len(batches), "batch": sorted(set(batches))}


@contextmanager
def _counted(network: Any, batches: list[int]) -> Iterator[None]:
    hook = network.register_forward_pre_hook(lambda _module, given: batches.append(len(given[0])))
    try:
        yield
    finally:
        hook.remove()


def _price_of(cells: int) -> dict[str, Any]:
    """Milliseconds and multiply-adds of one guided call, bare and with SeeSR, at `cells`² latent cells."""
    import torch

    loaded = _load(allow_gpu=False)
    side = cells * 8 // _SCALE
    photo = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        prepared = plugin("nodes.image").prepare_images(photo, scale=_SCALE, min_size=0)
        plain = [plugin("nodes.upscale").encode_text(loaded.clip, text) for text in ("a", "b")]
        cases = {"bare": (loaded.model, *plain), "seesr": _applied(loaded, photo, prepared)}
        return {name: _one_step(loaded, case, prepared) for name, case in cases.items()}


def _one_step(loaded: Loaded, case: tuple[Any, Any, Any], prepared: Any) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    latent, tiled = plugin("nodes.latent"), plugin("nodes.tiled")
    model, positive, negative = case
    sigmas = latent.schedule_sigmas(model, steps=3)
    noise, start = latent.latent_init(model, loaded.vae, prepared, sigmas, seed=0)
    sampler = plugin("nodes.upscale").comfy.samplers.sampler_object("euler")

    def run(levels: Any) -> None:
        tiled.sample(model, positive, negative, noise, sampler, levels, start, cfg=_CFG)

    run(sigmas)
    with FlopCounterMode(display=False) as counter:
        run(sigmas)
    milliseconds = min(_timed(lambda: run(sigmas)) for _ in range(3)) * 1000
    return {"ms": milliseconds / 3, "gmac": counter.get_total_flops() / 2 / 3 / 1e9}


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


_PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "row": _row,
    "start": _start_time,
    "calls": _count_calls,
    "price": _price_of,
}

if __name__ == "__main__":
    main()
