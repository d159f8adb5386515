"""Whole sampling runs through the host: SeeSR Scheduler, Latent Init's noise, SeeSR Apply, SeeSR Tiled Sampler, `ddpm`.

Noise is injected: the start's in the place of what is drawn for a seed, the steps' as the sampler's noise source. The
host keeps latents scaled by √(1 + σ²); they are compared without that factor, with the tolerances of the core. It adds
no noise at the last step, where the published scheduler adds some of standard deviation 1e-10.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seesr_core.tiling.grid import PIXELS_PER_CELL

from ...host.locate import plugin
from ..compare import Comparison
from ..groups.pipeline import (
    DEFAULT_OVERLAP,
    DEFAULT_TILE,
    GROUP,
    TABLE_TOLERANCE,
    Recording,
    Run,
    Trace,
    compare_grids,
    compare_run,
    input_set,
    networks_folder,
    read,
    run_names,
    salts,
)
from .networks import rule_made


@dataclass(kw_only=True, slots=True)
class Fixture(Recording):
    """A recording and the networks it was made with, in the host's classes."""

    model: Any
    seesr: Any

    @classmethod
    def load(cls, folder: Path) -> Fixture:
        """Read `folder`/pipeline; the networks come from another group's configurations and the weight rule."""
        recorded, nets = read(folder), networks_folder(folder)
        model, seesr = rule_made(nets, "tiny", salts(recorded["meta"], nets))
        return cls(**recorded, model=model, seesr=seesr)


def cases(folder: Path, *, full: bool) -> Iterator[Comparison]:
    """Tables, tile grids, and all runs; `full=False` leaves long and large runs out."""
    import comfy.utils

    comfy.utils.set_progress_bar_enabled(False)
    fixture = Fixture.load(folder)
    yield from schedule_cases(fixture)
    yield from grid_cases(fixture)
    for name in run_names(fixture, full=full):
        yield from run_cases(fixture, name)


def schedule_cases(fixture: Fixture) -> Iterator[Comparison]:
    """Timesteps of the scheduler's sigmas, the host's cumulative alphas, and the variance of its `ddpm` steps."""
    meta, sampling = fixture.meta, fixture.model.get_model_object("model_sampling")
    for steps, expected in meta.get("timesteps", {}).items():
        yield Comparison.equal(GROUP, f"steps_{steps}", "timesteps", _timesteps(fixture, steps=int(steps))[1], expected)
    if samples := meta.get("alphas_cumprod_samples"):
        actual = 1 / (1 + sampling.sigmas[[int(t) for t in samples]] ** 2)
        expected = torch.tensor(list(samples.values()))
        yield Comparison.of(GROUP, "schedule", "alphas_cumprod_samples", actual, expected, TABLE_TOLERANCE)
    for steps, variances in meta.get("fixed_small_variance", {}).items():
        sigmas, _ = _timesteps(fixture, steps=int(steps))
        actual = torch.stack([_step_std(*pair) for pair in pairwise(sigmas)]).double() ** 2
        expected = torch.tensor(list(variances.values()), dtype=torch.float64)
        yield Comparison.of(GROUP, f"steps_{steps}", "fixed_small_variance", actual, expected, TABLE_TOLERANCE)


def _timesteps(fixture: Fixture, **options: Any) -> tuple[Tensor, list[int]]:
    """SeeSR Scheduler's sigmas, and the timesteps that the host takes them for."""
    (sigmas,) = plugin("nodes.latent").SeeSRScheduler.execute(fixture.model, **options).args
    sampling = fixture.model.get_model_object("model_sampling")
    return sigmas, [int(t) for t in sampling.timestep(sigmas[:-1])]


def _step_std(sigma: Tensor, following: Tensor) -> Tensor:
    """What a step of the host's `ddpm` adds per unit of noise, in latents without the factor √(1 + σ²)."""
    import comfy.k_diffusion.sampling as k_diffusion

    zero = torch.zeros(())
    return k_diffusion.DDPMSampler_step(zero, sigma, following, zero, lambda *_: torch.ones(()))


def grid_cases(fixture: Fixture) -> Iterator[Comparison]:
    """Tile offsets and blending weights as the tiled sampler has them."""
    grids, settings_type = plugin("seesr_core.tiling.grid"), plugin("nodes.host.tiling.tiles").TileSettings

    def tiles_of(grid: Mapping[str, Any]) -> Any:
        settings = settings_type(tile=grid["tile"], overlap=grid["overlap"])
        return grids.tile_grid(*grid["latent_hw"], settings.tile, settings.overlap)

    def window(height: int, width: int) -> Tensor:
        weights: Tensor = grids.gaussian_window(height, width, settings_type(tile=height, overlap=0).window)
        return weights

    yield from compare_grids(fixture, tiles_of, window)


def run_cases(fixture: Fixture, name: str) -> Iterator[Comparison]:
    """One sampling run: what the U-Net saw first, the first guided eps, saved latents, and the result."""
    yield from compare_run(fixture, name, compute(fixture, name))


@torch.no_grad()
def compute(fixture: Fixture, name: str) -> Trace:
    """Sample run `name` with the nodes."""
    run = fixture.meta["runs"][name]
    case = input_set(fixture, name)
    inputs = {key.removeprefix(f"{case}."): x for key, x in fixture.inputs.items() if key.startswith(f"{case}.")}
    sigmas, steps = _timesteps(fixture, steps=run["num_inference_steps"], start_timestep=run["start_steps"])
    trace = Trace(timesteps=steps)
    model, positive, negative = _apply(fixture, run, inputs["cond_u8"])
    noise, latent = _start(fixture, run, inputs, sigmas)
    told = run if run.get("args") else {}
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: trace.unet_inputs.append(args[0]))
    try:
        plugin("nodes.tiled").SeeSRTiledSampler.execute(
            model,
            positive,
            negative,
            noise,
            recorded_ddpm(trace, inputs["step_noise"]),
            sigmas,
            latent,
            cfg=max(run["guidance_scale"], 1.0),
            tile_size=told.get("latent_tiled_size", DEFAULT_TILE) * PIXELS_PER_CELL,
            overlap=told.get("latent_tiled_overlap", DEFAULT_OVERLAP) * PIXELS_PER_CELL,
            tile_batch=1,
        )
    finally:
        hook.remove()
    return trace


def _apply(fixture: Fixture, run: Run, cond_u8: Tensor) -> Any:
    node, batch = plugin("nodes.apply").SeeSRApply, len(cond_u8)
    positive, negative = (
        [[fixture.inputs[key].expand(batch, -1, -1), {}]] for key in ("prompt_embeds", "negative_prompt_embeds")
    )
    applied = node.execute(
        model=[fixture.model],
        positive=[positive],
        negative=[negative],
        seesr_model=[fixture.seesr],
        soft_prompt=[fixture.inputs["soft_prompt"].expand(batch, -1, -1)],
        image=[cond_u8.float().movedim(1, -1) / 255],
        strength=[run["conditioning_scale"]],
        rca_strength=[1.0],
        start_percent=[0.0],
        end_percent=[1.0],
    ).args
    return tuple(entry for (entry,) in applied)


def _start(fixture: Fixture, run: Run, inputs: Mapping[str, Tensor], sigmas: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Latent Init's NOISE with the recorded noise, and its LATENT; a start from noise is one that keeps no latent."""
    noise = plugin("nodes.host.noise").LRENoise.for_model(
        fixture.model, sigmas, seed=0, start_timestep=run["start_steps"], draw=lambda *_: inputs["noise0"]
    )
    if run["start_point"] == "noise":
        return replace(noise, acp=0.0), {"samples": torch.zeros_like(inputs["noise0"])}
    return noise, {"samples": inputs["vae_latent_unscaled"]}


def recorded_ddpm(trace: Trace, noise_S4hw: Tensor) -> Any:
    """The host's `ddpm` with the recorded noise, as a SAMPLER that writes down every step."""
    import comfy.k_diffusion.sampling as k_diffusion
    import comfy.samplers

    rows = iter(noise_S4hw)

    def sample(model: Any, x: Tensor, sigmas: Tensor, *, callback: Any, noise_sampler: Any, **host: Any) -> Tensor:
        def keep(step: dict[str, Any]) -> None:
            sigma = sigmas[step["i"]]
            trace.eps.append((step["x"] - step["denoised"]) / sigma)
            if step["i"] > 0:
                trace.latents.append(step["x"] / (1 + sigma**2).sqrt())
            callback(step)

        result = k_diffusion.sample_ddpm(model, x, sigmas, callback=keep, noise_sampler=noise_sampler, **host)
        trace.latents.append(result)
        return result

    return comfy.samplers.KSAMPLER(sample, {"noise_sampler": lambda *_: next(rows).expand_as(noise_S4hw[:1])})
