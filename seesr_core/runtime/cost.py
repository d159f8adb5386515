"""What upscaling a photo will take: memory, as the run itself estimates it, and time, from counted operations.

The operations of one call of U-Net and ControlNet are an exact polynomial in the number of latent cells n (attention is
quadratic); its coefficients were counted on the networks and a test counts them again. How fast a device works through
them is a guess within a factor of two.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from ..errors import SettingsError
from ..formats.metadata import field
from ..formats.tensorfile import read_header
from ..method.reuse import ROOM
from ..model_files import GivenFiles, find_model
from ..models import Models
from ..pictures.sizes import Sizes, prepare_size
from ..settings import UpscaleSettings
from .memory import available_memory, gigabytes
from .planning import count_tiles, estimate, tiles_of

CARDS = Path(__file__).parent / "cards.json"
_RUNTIME = 0.5e9
"""Bytes of Python, torch and its libraries on a CPU, of the context on a GPU."""
_CARD_SHARE, _CARD_LIMIT = 0.3, 60e12
"""Share of its stated throughput that a card reaches on these networks; none does more, since kernels are small."""
_EMBEDDED = 4
"""Bytes of a number of the image encoder's, at most."""
_CPU_SHARE = 0.8
"""The same for a CPU, of what it reaches on one large matrix product."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What counts of a model's sizes."""

    name: str
    """Name of the model for messages."""
    channels: int
    """First channels of the U-Net."""
    vae_channels: int
    """First channels of the autoencoder."""
    call: tuple[float, float, float]
    """Operations of one call of U-Net and ControlNet: a + b·n + c·n² for n latent cells."""
    control_share: float
    """Share of the ControlNet in a call, ± 0.015 by size, which `control_reuse` saves between its own calls."""
    hint_share: float
    """Share of its image encoder in a call, ± 0.015 by size, which is asked once in a run."""
    vae_pixel: tuple[float, float]
    """Operations of encoding and decoding, a pixel: a + b·(pixels of a tile)."""
    tagger: float
    """Operations of the tagger."""
    half: int
    """Parameters kept in the networks' precision: U-Net, ControlNet, autoencoder."""
    single: int
    """Parameters kept in single precision: text encoder and tagger."""


FULL = ModelShape(
    name="SeeSR on Stable Diffusion 2-base",
    channels=320,
    vae_channels=128,
    call=(1.12536781e10, 3.1269024e8, 2.0445e4),
    control_share=0.27,
    hint_share=0.009,
    vae_pixel=(1.3589699e7, 1.0),
    tagger=3.2e11,
    half=1_126_760_324 + 489_031_440 + 83_653_863,
    single=340_387_840 + 212_117_045,
)
"""The published model."""

NANO = ModelShape(
    name="the embedded small model",
    channels=64,
    vae_channels=64,
    call=(9.9221504e7, 5.784192e6, 280.0),
    control_share=0.41,
    hint_share=0.235,
    vae_pixel=(1.00584e6, 0.0),
    tagger=2e9,
    half=6_844_112 + 2_771_328 + 4_240_080 + 2_458_899,
    single=1_298_112 + 4_402_335,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Something that computes."""

    name: str
    """Name of the device."""
    kind: str
    """`cpu` or `cuda`."""
    memory: int | None
    """Bytes that a run may use; None where unknown."""
    speed: float
    """Operations a second on these networks."""
    dtype: torch.dtype
    """Precision that a run would take on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What one photo will take."""

    sizes: Sizes
    """Sizes of the picture at all stages, in pixels."""
    steps: int
    """Denoising steps."""
    tiles: int
    """Tiles a step."""
    seconds: float
    """Rough time, without loading; within a factor of two."""
    bytes: int
    """Peak memory on the device."""
    device: Device
    """The device that the prediction is for."""
    model: str
    """Name of the model that the prediction is for."""

    @property
    def fits(self) -> bool:
        """Whether the device has that much memory, as far as is known."""
        return self.device.memory is None or self.bytes <= self.device.memory

    def text(self) -> str:
        """All of it in words, without a full stop."""
        (w, h), (fw, fh) = self.sizes.lr, self.sizes.final
        have = f" of {gigabytes(self.device.memory)}" if self.device.memory is not None else ""
        return (
            f"{w}×{h} to {fw}×{fh} with {self.model}: {self.steps} steps of {self.tiles} tiles, about "
            f"{gigabytes(self.bytes)}{have} and very roughly {_duration(self.seconds)} on {self.device.name}"
        )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.0f} hours"


def of_model(model: str | Path, given: GivenFiles | None = None) -> tuple[ModelShape, dict[str, Any]]:
    """The shape of a model (see `models.load_models`) and the defaults that its file brings, from its header alone.

    Raises:
        WeightsError: no such model, or a damaged one.
    """
    path = find_model(model, given or GivenFiles()).control
    if path.is_dir():  # the published folder
        return FULL, {}
    header = read_header(path).metadata
    small = field(path, header, "config")["unet"]["block_out_channels"][0] < FULL.channels
    return NANO if small else FULL, field(path, header, "defaults", default={})


def predict(shape: ModelShape, lr: tuple[int, int], settings: UpscaleSettings, device: Device) -> Prediction:
    """Memory and time for one photo.

    Args:
        shape: the model.
        lr: (width, height) of the photo.
        settings: scale, steps, tiles and so on.
        device: where.
    """
    settings, final = settings.for_photo(lr), settings.result_size(lr)
    sizes = replace(prepare_size(*lr, scale=settings.scale, min_size=settings.min_size), final=final)
    needs = estimate(_stand_in(shape, device), settings, sizes)
    weights = shape.half * device.dtype.itemsize + shape.single * 4
    pictures = max(needs.pictures, needs.held + needs.networks) if device.kind == "cpu" else needs.networks
    return Prediction(
        sizes=sizes,
        steps=len(settings.denoised_timesteps()),
        tiles=count_tiles(*sizes.prepared, settings),
        seconds=_operations(shape, sizes, settings) / device.speed,
        bytes=int(weights + pictures + _RUNTIME),
        device=device,
        model=shape.name,
    )


def _stand_in(shape: ModelShape, device: Device) -> Models:
    """As much of a loaded model as the run's own estimate looks at."""
    unet = SimpleNamespace(config=SimpleNamespace(block_out_channels=[shape.channels]))
    vae = SimpleNamespace(config={"encoder_block_out_channels": [shape.vae_channels]})
    found = SimpleNamespace(unet=unet, vae=vae, device=torch.device(device.kind), dtype=device.dtype)
    return cast(Models, found)


def _operations(shape: ModelShape, sizes: Sizes, settings: UpscaleSettings) -> float:
    width, height = sizes.prepared
    tiles = tiles_of(width, height, settings)
    cells = tiles[0].height * tiles[0].width
    constant, linear, square = shape.call
    call = constant + linear * cells + square * cells**2
    pixel, quadratic = shape.vae_pixel
    vae = width * height * (pixel + quadratic * min(width * height, settings.vae_tile**2))
    halves = settings.halves()
    asked = halves[:: settings.control_reuse]
    kept = min(1.0, ROOM / (len(tiles) * max(halves) * shape.channels * cells * _EMBEDDED))
    spared = shape.control_share * (sum(halves) - sum(asked)) + kept * shape.hint_share * (sum(asked) - sum(set(asked)))
    return (sum(halves) - spared) * len(tiles) * call + vae + shape.tagger


def card(name: str) -> Device:
    """A card by its name, or a part of it.

    Raises:
        SettingsError: it is not in the table.
    """
    for entry in _cards():
        if entry["name"].lower() in name.lower():
            speed = min(entry["teraflops"] * 1e12 * _CARD_SHARE, _CARD_LIMIT)
            return Device(
                name=entry["name"],
                kind="cuda",
                memory=int(entry["gigabytes"] * 1e9),
                speed=speed,
                dtype=torch.float16,
            )
    raise SettingsError(f"Unknown card {name!r}: expected {', '.join(entry['name'] for entry in _cards())}.")


def this_device(device: torch.device, dtype: torch.dtype) -> Device:
    """The device of this machine, its memory asked and its speed measured in half a second."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = any(entry["name"].lower() in name.lower() for entry in _cards())
        speed = card(name).speed if known else min(matrix_speed(device, dtype) * _CARD_SHARE, _CARD_LIMIT)
        return Device(name=name, kind="cuda", memory=available_memory(device), speed=speed, dtype=dtype)
    speed = matrix_speed(device, dtype) * _CPU_SHARE
    return Device(name=str(device), kind="cpu", memory=available_memory(device), speed=speed, dtype=dtype)


def _cards() -> list[dict[str, Any]]:
    cards: list[dict[str, Any]] = json.loads(CARDS.read_text(encoding="utf-8"))["cards"]
    return cards


def matrix_speed(device: torch.device, dtype: torch.dtype, *, side: int = 1024, seconds: float = 0.4) -> float:
    """Operations a second of square matrix products, the fastest of several."""
    a = torch.full((side, side), 0.5, device=device, dtype=dtype)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
