"""The sections about inference; each gives plain JSON."""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seesr_core.errors import ResourceError
from seesr_core.method.denoiser import predict_noise
from seesr_core.method.rca import SOFT_PROMPT_DIM, soft_prompt_dim
from seesr_core.pipeline import SeeSRPipeline
from seesr_core.runtime import cost
from seesr_core.runtime.planning import default_tile_batch

from ..bench import core, nets
from ..bench.case import Case, Row
from ..bench.watch import Watch
from .context import Context

MIB = 2**20
_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_SHAPES = 64
"""Of the blocks that are compiled, at most."""
BOUNDS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Relative L2 distance that a prediction of the card may have from the CPU's in fp32, TF32 off: rounding of 24, 11 and
8 bits through some 500 layers."""


def environment(context: Context) -> dict[str, Any]:
    """Versions, the card, and the rate of its matrix products in operations a second."""
    device = context.device
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": str(device)}
    found["cores"] = os.cpu_count()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"name": card.name, "memory MiB": card.total_memory // MIB, "cuda": torch.version.cuda}
        found["capability"] = f"{card.major}.{card.minor}"
    side = 256 if context.small else 8192
    rates = {name: cost.matrix_speed(device, nets.TORCH_DTYPES[name], side=side) for name in context.dtypes}
    with _tf32(True):
        rates["tf32"] = cost.matrix_speed(device, torch.float32, side=side)
    return {**found, "matrix TFLOP/s": {name: rate / 1e12 for name, rate in rates.items()}}


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def parity(context: Context) -> dict[str, Any]:
    """A prediction of the embedded model's networks and a whole picture, on the card and on the CPU."""
    here = nets.core_models("small" if context.small else "nano", "fp32", "cpu")
    expected, found = _prediction(here.unet, here.controlnet, torch.device("cpu"), torch.float32), dict[str, Any]()
    with _tf32(False):
        for name in context.dtypes:
            dtype = nets.TORCH_DTYPES[name]
            unet, control = (copy.deepcopy(net).to(context.device, dtype) for net in (here.unet, here.controlnet))
            distance = _distance(_prediction(unet, control, context.device, dtype), expected)
            found[name] = {"relative L2": distance, "bound": BOUNDS[name], "within": distance <= BOUNDS[name]}
        found["picture"] = {"mean levels": _picture_distance(context, here)}
    return found


def _prediction(unet: Any, control: Any, device: torch.device, dtype: torch.dtype, cells: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, text = drawn(2, unet.config.in_channels, cells, cells), drawn(2, 77, unet.config.cross_attention_dim)
    image, soft = (
        drawn(2, 3, 8 * cells, 8 * cells).sigmoid(),
        drawn(2, 145, soft_prompt_dim(unet.state_dict()) or SOFT_PROMPT_DIM),
    )
    return predict_noise(unet, control, x, 501, text, image=image, soft_prompt=soft).float().cpu()


def _distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def _picture_distance(context: Context, here: Any) -> float:
    pictures, steps = [], {"steps": 4} if context.small else {}
    for device in (torch.device("cpu"), context.device):
        models = copy.copy(here) if device == here.device else nets.core_models("nano", "fp32", str(device))
        pipeline = SeeSRPipeline(models=models)
        made = pipeline(core.photo(32), pipeline.settings(min_size=0, **steps)).image
        pictures.append(torch.tensor(list(made.tobytes())))
    return float((pictures[0].float() - pictures[1].float()).abs().mean())


@torch.no_grad()
def attention(context: Context) -> dict[str, Any]:
    """Which kernels take the U-Net's attentions at 512², both halves, and how long each takes."""
    tokens, heads, width = (64, 2, 16) if context.small else (4096, 5, 64)
    dtype, device = nets.TORCH_DTYPES[context.half], context.device
    found: dict[str, Any] = {}
    for name, length, masked in (
        ("itself", tokens, False),
        ("text", 77, False),
        ("soft prompt", 145, False),
        ("regions", 77, True),
    ):
        q = torch.randn(2, heads, tokens, width, device=device, dtype=dtype)
        k, v = (torch.randn(2, heads, length, width, device=device, dtype=dtype) for _ in range(2))
        mask = torch.zeros(2, 1, tokens, length, device=device, dtype=dtype) if masked else None
        found[name] = {backend.name: _kernel(context, backend, q, k, v, mask) for backend in _BACKENDS}
        found[name]["chosen"] = 1000 * context.seconds(lambda: F.scaled_dot_product_attention(q, k, v, mask))  # noqa: B023
    return {"ms": found}


def _kernel(context: Context, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> float | str:
    try:
        with sdpa_kernel(backend):
            return 1000 * context.seconds(lambda: F.scaled_dot_product_attention(q, k, v, mask))
    except RuntimeError:
        return "not for these"


def nano(context: Context) -> dict[str, Any]:
    """The embedded model by phase."""
    return _phases(context, "small" if context.small else "nano", (512, 1024), steps=4)


def full(context: Context) -> dict[str, Any]:
    """Networks of the published sizes by phase."""
    return _phases(context, context.net, (512,), steps=4, dtypes=(context.half, "bf16"))


def _phases(
    context: Context, net: str, sides: tuple[int, ...], *, steps: int, dtypes: tuple[str, ...] = ()
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in dict.fromkeys(dtypes or context.dtypes):
        models = nets.core_models(net, dtype, str(context.device))
        for side in sides:
            case = _case(context, net, dtype, side, steps=steps)
            found[f"{dtype}, {side}"] = _row(core.measure(case, Watch(aloud=False), models))
    return found


def _case(context: Context, net: str, dtype: str, side: int, **more: Any) -> Case:
    return Case(place="core", net=net, dtype=dtype, side=context.side(side), tile=context.side(768), **more)


def _row(row: Row) -> dict[str, Any]:
    phases = {name: {"s": cost.seconds, "peak MiB": cost.peak_mib} for name, cost in row.phases.items()}
    return {**phases, "calls": row.calls}


def ddpm50(context: Context) -> dict[str, Any]:
    """The published sampling at 512², and the share of the card's matrix rate that it reaches."""
    steps = 4 if context.small else 50
    models = nets.core_models(context.net, context.half, str(context.device))
    row = core.measure(_case(context, context.net, context.half, 512, steps=steps), Watch(aloud=False), models)
    rate = cost.matrix_speed(context.device, nets.TORCH_DTYPES[context.half], side=256 if context.small else 8192)
    constant, linear, square = cost.FULL.call
    cells = (512 // 8) ** 2
    operations = 2 * steps * (constant + linear * cells + square * cells**2)
    reached = operations / row.sampling.seconds
    return {
        "seconds": row.whole.seconds,
        "sampling s": row.sampling.seconds,
        "steps a second": steps / row.sampling.seconds,
        "TFLOP needed": operations / 1e12,
        "TFLOP/s reached": reached / 1e12,
        "matrix TFLOP/s": rate / 1e12,
        "share": reached / rate,
    }


def memory(context: Context) -> dict[str, Any]:
    """Peak of a whole run against what the planner says, for growing pictures."""
    models = nets.core_models(context.net, context.half, str(context.device))
    found: dict[str, Any] = {}
    for side in (512, 1024, 2048, 4096):
        case = _case(context, context.net, context.half, side, steps=1)
        row = core.measure(case, Watch(aloud=False), models)
        place = cost.Device(
            name=str(context.device), kind=context.device.type, memory=None, speed=1.0, dtype=models.dtype
        )
        settings = SeeSRPipeline(models=models).settings(**core.given(case))
        said = cost.predict(cost.FULL, (case.side // 4, case.side // 4), settings, place).bytes / MIB
        found[str(side)] = {"peak MiB": row.whole.peak_mib, "forecast MiB": said, "ratio": row.whole.peak_mib / said}
    return found


@torch.no_grad()
def compiled(context: Context) -> dict[str, Any]:
    """A call of both networks for two latents, eager, in channels_last, and with the repeated blocks compiled."""
    from torch._dynamo import config

    models = nets.core_models(context.net, context.half, str(context.device))

    def call() -> None:
        _prediction(models.unet, models.controlnet, context.device, models.dtype, context.side(512) // 8)

    found = {"eager ms": 1000 * context.seconds(call)}
    for net in (models.unet, models.controlnet):
        net.to(memory_format=torch.channels_last)
    found["channels_last ms"] = 1000 * context.seconds(call)
    for net in (models.unet, models.controlnet):
        net.to(memory_format=torch.contiguous_format)
        for part in net.modules():
            if type(part).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
                part.compile(backend="eager" if context.small else "inductor")
    # Blocks of one class share their code, and have more shapes than torch compiles of one code by default.
    with config.patch(cache_size_limit=_SHAPES):
        found["first compiled call s"] = context.wait(call)
        found["compiled ms"] = 1000 * context.seconds(call)
    return found


@torch.no_grad()
def tiles(context: Context) -> dict[str, Any]:
    """Tiles at once, and one sentence instead of a stack trace where memory runs out."""
    models = nets.core_models(context.net, context.half, str(context.device))
    pipeline = SeeSRPipeline(models=models)
    case = Case(place="core", net=context.net, side=context.side(2048), tile=context.side(512), steps=1)
    found: dict[str, Any] = {"chosen": default_tile_batch(context.device)}
    for count in (1, 2, 4, 8):
        settings = pipeline.settings(**{**core.given(case), "tile_batch": count})
        latent, prepared, states, soft = core.drawn(pipeline, case)

        def work(latent: Any = latent, settings: Any = settings) -> None:
            pipeline.sample(prepared, latent, states, soft, settings)  # noqa: B023

        found[f"{count} at once"] = {"s": context.seconds(work, times=1), "peak MiB": context.peak(work) / MIB}
    with _without_memory(context, models):
        try:
            pipeline.run([core.photo(case.side // 4)], pipeline.settings(**core.given(case)))
            found["without memory"] = "ran all the same"
        except ResourceError as error:
            found["without memory"] = str(error)
    return found


@contextmanager
def _without_memory(context: Context, models: Any) -> Iterator[None]:
    """Inside, the card has no more memory than is held already; on the CPU the U-Net says so."""
    if context.device.type == "cuda":
        held, all_of_it = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(context.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min((held + 64 * MIB) / all_of_it, 1.0))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory, as this section wants it")

    hook = models.unet.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()
