"""A case inside ComfyUI, with the nodes' own functions; and what the plugin adds to the host's start and to a call."""

from __future__ import annotations

import importlib
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.host import locate
from tests.host.locate import host_folder, import_host, load_plugin, plugin

from .case import CFG, SAMPLE, SCALE, Case, Row
from .watch import Watch

_BEFORE_PLUGINS = ("nodes", "comfy_extras.nodes_custom_sampler", "comfy_extras.nodes_canny", "comfy_api.latest")
"""What the host has imported before it turns to plugins, as far as it matters here."""
_OVERLAP_PX = 128
"""Of the host's own tiles of the autoencoder."""


@dataclass(slots=True)
class Loaded:
    """A model in the host's own objects; of networks by the rule only what samples."""

    model: Any
    clip: Any
    vae: Any
    dape: Any
    seesr: Any


def measure(case: Case, watch: Watch) -> Row:
    """A photo to a square picture."""
    import torch

    loaded = load(case.net, dtype=case.dtype)
    photo = torch.rand(1, case.side // SCALE, case.side // SCALE, 3, generator=torch.Generator().manual_seed(0))
    watch.row.device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        warm = Case(kind="untiled", steps=1, side=64, alone=case.alone or case.net != "nano")
        run(loaded, photo[:, :16, :16], warm, Watch(aloud=False))  # loads weights
        networks = {"unet": loaded.model.model.diffusion_model, "controlnet": loaded.seesr.control.control_model}
        with watch.counting(**networks):
            run(loaded, photo, case, watch)
    watch.row.done = True
    watch.say()
    return watch.row


def load(net: str = "nano", *, dtype: str = "fp32", allow_gpu: bool = True) -> Loaded:
    """The embedded model, or U-Net and ControlNet of the published sizes by the rule."""
    start_host(allow_gpu, dtype)
    load_plugin()
    plugin("nodes")
    if net != "nano":
        return _by_rule(net)
    import comfy.sd

    nano = locate.PLUGIN / "seesr_core" / "nano"
    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(nano / "checkpoints" / "seesr-nano.safetensors"))
    dape = plugin("nodes.host.dape").load_dape(nano / "dape" / "dape-nano.safetensors")
    seesr = plugin("nodes.host.seesr_model").load_seesr_model(nano / "seesr" / "seesr-nano-control.safetensors")
    return Loaded(model, clip, vae, dape, seesr)


def _by_rule(net: str) -> Loaded:
    from tests.golden import find_golden
    from tests.parity.host.networks import rule_made

    golden = find_golden()
    if golden is None:
        raise SystemExit("Networks by the rule need the lists of published keys among the golden numbers.")
    model, seesr = rule_made(golden / "unet_controlnet", "full" if net == "full" else "tiny", ("", ""))
    return Loaded(model, None, None, None, seesr)


def start_host(allow_gpu: bool, dtype: str = "fp32") -> None:
    """Import the host with a base directory of its own, on the GPU if there is one, its U-Net in a precision."""
    import torch

    import_host()
    args = importlib.import_module("comfy.cli_args").args
    args.cpu = not (allow_gpu and torch.cuda.is_available())
    setattr(args, f"{dtype}_unet", True)
    args.base_directory = tempfile.mkdtemp(prefix="comfyui-")
    sys.path.insert(0, str(host_folder()))


def run(loaded: Loaded, photo_BHWC: Any, case: Case, watch: Watch) -> Any:
    """What SeeSRUpscale does, phase by phase; "nodes": with the pictures that nodes exchange."""
    if case.alone:
        return _run_alone(loaded, photo_BHWC, case, watch)
    if case.kind == "three-passes":
        _use_the_hosts_tilers()
    image, latent, vae = (plugin(f"nodes.{name}") for name in ("image", "latent", "host.vae"))
    with watch.phase("prepare"):
        prepare = image.prepare_images if case.kind == "nodes" else image.prepare_levels
        prepared = prepare(photo_BHWC, scale=SCALE, min_size=0)
    with watch.phase("prompts"):
        texts = [[plugin("nodes.upscale").encode_text(loaded.clip, text)] for text in ("clean, 8k", "dotted, noise")]
        soft = loaded.dape.read(photo_BHWC).tokens_BLD
    model, *prompts = plugin("nodes.apply").apply_seesr(loaded.model, *texts, loaded.seesr, soft, prepared)
    sigmas = latent.schedule_sigmas(model, steps=case.steps)
    with watch.phase("encode"):
        noise, start = latent.latent_init(model, loaded.vae, prepared, sigmas, seed=0)
    with watch.phase(SAMPLE):
        sampled = _sample(_tiled(model, case), prompts, noise, sigmas, start, case)
    with watch.phase("decode"):
        decoded = vae.decode_latent(loaded.vae, sampled["samples"])
    with watch.phase("finish"):
        return image.finish_images(decoded, prepared, photo_BHWC, scale=SCALE, color_fix="adain")


def _use_the_hosts_tilers() -> None:
    """From here on large pictures pass the autoencoder as VAE Encode and Decode (Tiled) have it, in tiles as large."""
    module: Any = plugin("nodes.host.vae")

    def encode(tiles: Any, image_B3HW: Any, *, tile_px: int) -> Any:
        return tiles._vae.encode_tiled(image_B3HW.movedim(1, -1), tile_x=tile_px, tile_y=tile_px, overlap=_OVERLAP_PX)

    def decode(tiles: Any, latents_BChw: Any, *, tile_px: int) -> Any:
        cells, overlap = tile_px // tiles.pixels_per_cell, _OVERLAP_PX // tiles.pixels_per_cell
        return tiles._vae.decode_tiled(latents_BChw, tile_x=cells, tile_y=cells, overlap=overlap).movedim(-1, 1)

    module.encode_tiled, module.decode_tiled = encode, decode


def _run_alone(loaded: Loaded, photo_BHWC: Any, case: Case, watch: Watch) -> Any:
    """The sampling, of drawn latents and prompts."""
    import torch

    latent, generator = plugin("nodes.latent"), torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    height, width = (SCALE * side for side in photo_BHWC.shape[1:3])
    prepared = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    soft = drawn(1, 145, loaded.seesr.context_dim)
    texts = [[[[drawn(1, 77, loaded.seesr.text_dim), {}]]] for _ in range(2)]
    model, *prompts = plugin("nodes.apply").apply_seesr(loaded.model, *texts, loaded.seesr, soft, prepared)
    sigmas = latent.schedule_sigmas(model, steps=case.steps)
    noise = latent.LRENoise.for_model(model, sigmas, seed=0)
    channels = model.get_model_object("latent_format").latent_channels
    with watch.phase(SAMPLE):
        start = {"samples": 5 * drawn(1, channels, height // 8, width // 8)}
        return _sample(_tiled(model, case), prompts, noise, sigmas, start, case)


def _tiled(model: Any, case: Case) -> Any:
    if case.kind == "untiled":
        return model
    tiled = plugin("nodes.tiled")
    layout = {"layout": "balanced"} if case.kind == "balanced" else {}  # which earlier releases lack
    return tiled.tile_model(model, tiled.TileSettings.from_pixels(case.tile, 32, tile_batch=1, **layout))


def _sample(model: Any, prompts: Any, noise: Any, sigmas: Any, start: Any, case: Case) -> Any:
    sampler = plugin("nodes.upscale").comfy.samplers.sampler_object("ddpm")
    return plugin("nodes.tiled").sample(model, *prompts, noise, sampler, sigmas, start, cfg=case.cfg)[0]


def start_time() -> dict[str, Any]:
    """Seconds to import the plugin and ask for its nodes after the host has imported itself, sockets blocked."""
    import asyncio

    start_host(allow_gpu=False)
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
    assert described
    return {"seconds": time.perf_counter() - began, "busy": time.process_time() - busy}


def _blocked(*_: Any, **__: Any) -> Any:
    raise AssertionError("the plugin touched the network while it was imported")


def price(cells: int) -> dict[str, Any]:
    """Milliseconds and multiply-adds of one guided call, bare and with SeeSR, at `cells`² latent cells."""
    import torch

    loaded = load(allow_gpu=False)
    side = cells * 8 // SCALE
    photo = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        prepared = plugin("nodes.image").prepare_images(photo, scale=SCALE, min_size=0)
        plain = [plugin("nodes.upscale").encode_text(loaded.clip, text) for text in ("a", "b")]
        soft = loaded.dape.read(photo).tokens_BLD
        applied = plugin("nodes.apply").apply_seesr(
            loaded.model, *[[text] for text in plain], loaded.seesr, soft, prepared
        )
        cases = {"bare": (loaded.model, *plain), "seesr": applied}
        return {name: _one_step(loaded, case, prepared) for name, case in cases.items()}


def _one_step(loaded: Loaded, case: tuple[Any, Any, Any], prepared: Any) -> dict[str, float]:
    from torch.utils.flop_counter import FlopCounterMode

    latent, tiled = plugin("nodes.latent"), plugin("nodes.tiled")
    model, positive, negative = case
    sigmas = latent.schedule_sigmas(model, steps=3)
    noise, start = latent.latent_init(model, loaded.vae, prepared, sigmas, seed=0)
    sampler = plugin("nodes.upscale").comfy.samplers.sampler_object("euler")

    def run_it() -> None:
        tiled.sample(model, positive, negative, noise, sampler, sigmas, start, cfg=CFG)

    run_it()
    with FlopCounterMode(display=False) as counter:
        run_it()
    milliseconds = min(_timed(run_it) for _ in range(3)) * 1000
    return {"ms": milliseconds / 3, "gmac": counter.get_total_flops() / 2 / 3 / 1e9}


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
