"""Whole sampling runs of the tiny networks: start, every saved step, tiles, and the schedule's tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from seesr_core.method.controlnet import build_controlnet
from seesr_core.method.denoiser import Denoiser
from seesr_core.method.sampling import RecordedNoise, sample, start_latent
from seesr_core.method.schedule import alphas_cumprod, ddpm_variance, timesteps
from seesr_core.method.unet import build_unet
from seesr_core.tiling.grid import Tile, TiledDenoiser, gaussian_window, tile_grid
from seesr_core.tiling.runner import PlacedDenoiser

from ..compare import Comparison
from ..weights import rule_state_dict

GROUP = "pipeline"
LATENT_TOLERANCE = 1e-3
TABLE_TOLERANCE = 1e-6
WEIGHTS_TOLERANCE = 1e-12
# What the published loop falls back to when it is called without tile settings.
DEFAULT_TILE, DEFAULT_OVERLAP = 256, 4
FAST_STEPS, FAST_CELLS = 5, 2000

Run = Mapping[str, Any]


@dataclass(kw_only=True, slots=True)
class Recording:
    """What a folder holds of its runs."""

    meta: Mapping[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass(kw_only=True, slots=True)
class Fixture(Recording):
    """A recording and the two networks it was made with."""

    unet: Any
    controlnet: Any

    @classmethod
    def load(cls, folder: Path) -> Fixture:
        """Read `folder`/pipeline; the networks come from another group's configurations and the weight rule."""
        recorded, nets = read(folder), networks_folder(folder)
        unet_salt, controlnet_salt = salts(recorded["meta"], nets)
        return cls(
            **recorded,
            unet=rule_made(build_unet(_read(nets / "tiny_unet_config.json")), unet_salt),
            controlnet=rule_made(build_controlnet(_read(nets / "tiny_controlnet_config.json")), controlnet_salt),
        )


def read(folder: Path) -> dict[str, Any]:
    """The fields of `folder`/pipeline's `Recording`."""
    files = folder / GROUP
    tensors = {name: load_file(files / f"{name}.safetensors") for name in ("inputs", "outputs")}
    return {"meta": _read(files / "meta.json"), **tensors}


def networks_folder(folder: Path) -> Path:
    """`folder`/unet_controlnet; where `folder` lacks that group, the standard golden folder's."""
    nets = folder / "unet_controlnet"
    if not nets.is_dir():
        from ...golden import find_golden

        golden = find_golden()
        nets = golden / "unet_controlnet" if golden else nets
    return nets


def salts(meta: Mapping[str, Any], nets: Path) -> tuple[str, str]:
    """Salts of U-Net and ControlNet: named in the `models` sentence, else in the tiny networks' own file."""
    named = re.search(r"salts?\s+([^\s,()]+)\s*,\s*([^\s,()]+)", str(meta.get("models", "")))
    if named:
        return named[1], named[2]
    tiny = _read(nets / "tiny_meta.json")
    return tiny["salt_unet"], tiny["salt_controlnet"]


def rule_made(net: Any, salt: str) -> Any:
    """`net` with rule-made weights under its own keys, in evaluation mode."""
    net.load_state_dict(rule_state_dict({key: value.shape for key, value in net.state_dict().items()}, salt))
    return net.eval()


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Tables, tile grids, and all runs; `full=False` leaves long and large runs out."""
    fixture = Fixture.load(folder)
    yield from schedule_cases(fixture)
    yield from grid_cases(fixture)
    for name in run_names(fixture, full=full):
        yield from run_cases(fixture, name)


def run_names(recording: Recording, *, full: bool) -> list[str]:
    """The recorded runs; `full=False` leaves long and large ones out."""
    return [name for name, run in recording.meta["runs"].items() if full or is_fast(run)]


def is_fast(run: Run) -> bool:
    """Whether a run takes a second or two."""
    height, width = run["final"]["shape"][-2:]
    return len(run["denoised_timesteps"]) <= FAST_STEPS and height * width <= FAST_CELLS


def schedule_cases(fixture: Fixture) -> Iterator[Comparison]:
    """Timestep lists, cumulative alphas, and the variance of every step."""
    meta, table = fixture.meta, alphas_cumprod()
    for steps, expected in meta.get("timesteps", {}).items():
        yield Comparison.equal(GROUP, f"steps_{steps}", "timesteps", timesteps(int(steps)), expected)
    if "alphas_cumprod_f32" in fixture.inputs:
        expected = fixture.inputs["alphas_cumprod_f32"]
        yield Comparison.of(GROUP, "schedule", "alphas_cumprod", table, expected, TABLE_TOLERANCE)
    if samples := meta.get("alphas_cumprod_samples"):
        actual = table[[int(t) for t in samples]]
        expected = torch.tensor(list(samples.values()))
        yield Comparison.of(GROUP, "schedule", "alphas_cumprod_samples", actual, expected, TABLE_TOLERANCE)
    for steps, variances in meta.get("fixed_small_variance", {}).items():
        falling = [int(t) for t in variances]
        computed = [ddpm_variance(t, previous=p) for t, p in zip(falling, [*falling[1:], -1], strict=True)]
        actual, expected = (torch.tensor(v, dtype=torch.float64) for v in (computed, list(variances.values())))
        yield Comparison.of(GROUP, f"steps_{steps}", "fixed_small_variance", actual, expected, TABLE_TOLERANCE)


def grid_cases(fixture: Fixture) -> Iterator[Comparison]:
    """Tile offsets and blending weights."""

    def tiles_of(grid: Mapping[str, Any]) -> list[Tile]:
        height, width = grid["latent_hw"]
        return tile_grid(height, width, grid["tile"], grid["overlap"])

    yield from compare_grids(fixture, tiles_of, gaussian_window)


def compare_grids(
    recording: Recording,
    tiles_of: Callable[[Mapping[str, Any]], Sequence[Tile]],
    window: Callable[[int, int], Tensor],
) -> Iterator[Comparison]:
    """Offsets of the tiles that `tiles_of` lays for each recorded grid, and `window` of their height and width."""
    for key, grid in recording.meta.items():
        if not key.endswith("_grid"):
            continue
        name, tiles = key.removesuffix("_grid"), tiles_of(grid)
        yield Comparison.equal(GROUP, name, "tile_offsets", [[tile.y, tile.x] for tile in tiles], grid["offsets_yx"])
        expected = recording.outputs.get(f"{name}.tile_weights_f64")
        if expected is not None:
            weights = window(tiles[0].height, tiles[0].width)
            yield Comparison.of(GROUP, name, "tile_weights", weights, expected, WEIGHTS_TOLERANCE)


def run_cases(fixture: Fixture, name: str) -> Iterator[Comparison]:
    """One sampling run: what the U-Net saw first, the first guided eps, saved latents, and the result."""
    yield from compare_run(fixture, name, compute(fixture, name))


def compare_run(recording: Recording, name: str, trace: Trace) -> Iterator[Comparison]:
    """What run `name` passed through against what was recorded of it."""
    run = recording.meta["runs"][name]
    yield Comparison.equal(GROUP, name, "denoised_timesteps", trace.timesteps, run["denoised_timesteps"])
    if "unet_batch" in run:
        yield Comparison.equal(GROUP, name, "unet_batch", list(trace.unet_inputs[0].shape), run["unet_batch"])
    prefix = f"{name}."
    for key in sorted(key for key in recording.outputs if key.startswith(prefix)):
        quantity = key.removeprefix(prefix)
        yield Comparison.of(GROUP, name, quantity, trace[quantity], recording.outputs[key], LATENT_TOLERANCE)


@dataclass(kw_only=True, slots=True)
class Trace:
    """Everything a run passed through, step by step."""

    timesteps: list[int]
    unet_inputs: list[Tensor] = field(default_factory=list)
    eps: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    def __getitem__(self, quantity: str) -> Tensor:
        """The tensor that a golden file calls `quantity`, such as `latents_after_step05`."""
        if quantity == "final":
            return self.latents[-1]
        stem, _, step = quantity.rpartition("_step")
        return {"unet_input": self.unet_inputs, "eps_guided": self.eps, "latents_after": self.latents}[stem][int(step)]


@torch.no_grad()
def compute(fixture: Fixture, name: str) -> Trace:
    """Sample run `name` with the project's own loop."""
    run = fixture.meta["runs"][name]
    case = input_set(fixture, name)
    inputs = {key.removeprefix(f"{case}."): x for key, x in fixture.inputs.items() if key.startswith(f"{case}.")}
    start = start_latent(
        inputs["noise0"],
        point=run["start_point"],
        z_lr=inputs["vae_latent_unscaled"] * fixture.meta["vae_scaling_factor"],
        start_timestep=run["start_steps"],
    )
    trace = Trace(timesteps=timesteps(run["num_inference_steps"], start_timestep=run["start_steps"]))
    denoise = tiled_denoiser(fixture, run, inputs["cond_u8"])

    def traced(x: Tensor, t: int) -> Tensor:
        trace.eps.append(denoise(x, t))
        return trace.eps[-1]

    hook = fixture.unet.register_forward_pre_hook(lambda _, args: trace.unet_inputs.append(args[0]))
    try:
        sample(
            traced,
            start,
            timesteps=trace.timesteps,
            noise_source=RecordedNoise(inputs["step_noise"]),
            callback=lambda _index, _t, x: trace.latents.append(x),
        )
    finally:
        hook.remove()
    return trace


def tiled_denoiser(fixture: Fixture, run: Run, image_u8: Tensor) -> TiledDenoiser:
    """The run's denoiser, put together as `SeeSRPipeline` does it.

    Without `args` the published loop does not see the run's tile settings.
    """
    batch = len(image_u8)
    denoiser = Denoiser(
        unet=fixture.unet,
        controlnet=fixture.controlnet,
        positive=fixture.inputs["prompt_embeds"].expand(batch, -1, -1),
        negative=fixture.inputs["negative_prompt_embeds"].expand(batch, -1, -1),
        soft_prompt=fixture.inputs["soft_prompt"].expand(batch, -1, -1),
        image=image_u8,
        cfg=run["guidance_scale"],
        control_scale=run["conditioning_scale"],
    )
    told = run if run.get("args") else {}
    return TiledDenoiser(
        denoise=PlacedDenoiser(denoiser=denoiser, device=torch.device("cpu"), dtype=torch.float32),
        tile=told.get("latent_tiled_size", DEFAULT_TILE),
        overlap=told.get("latent_tiled_overlap", DEFAULT_OVERLAP),
    )


def input_set(fixture: Recording, name: str) -> str:
    """Name of the inputs a run was made from: by its final shape, then by its picture's range, then by name."""
    run = fixture.meta["runs"][name]
    found = [key.removesuffix(".noise0") for key in fixture.inputs if key.endswith(".noise0")]
    found = [case for case in found if list(fixture.inputs[f"{case}.noise0"].shape) == run["final"]["shape"]]
    if not found:
        raise ValueError(f"no inputs of shape {run['final']['shape']} for run {name}")
    if len(found) > 1 and run.get("vae_encode_calls"):
        _, low, high = run["vae_encode_calls"][0]
        found = [case for case in found if _has_range(fixture.inputs[f"{case}.cond_u8"], low, high)] or found
    return max(found, key=lambda case: len(case) if name.startswith(case) else 0)


def _has_range(picture_u8: Tensor, low: float, high: float) -> bool:
    scaled = picture_u8.float() / 255 * 2 - 1
    return abs(scaled.min().item() - low) < 1e-4 and abs(scaled.max().item() - high) < 1e-4
