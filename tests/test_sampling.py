"""The sampling loop: start, noise, DDPM, and diffusers' solvers on the same interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from seesr_core.errors import SettingsError
from seesr_core.method.sampling import SOLVERS, RecordedNoise, StepNoise, sample, start_latent
from seesr_core.method.schedule import BETA_END, BETA_START, acp_at, lr_embedding, timesteps

from .golden import golden_dir
from .parity.groups import pipeline as parity

SHAPE = (1, 4, 4, 6)
SD2 = {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


def test_parity_of_schedule_tiles_and_short_runs():
    comparisons = list(parity.cases(golden_dir(), full=False))
    assert any(comparison.quantity == "final" for comparison in comparisons)
    assert [comparison.line() for comparison in comparisons if not comparison.ok] == []


def randn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wavy(x: Tensor, t: int) -> Tensor:
    """A denoiser that depends on everything, nonlinearly."""
    return torch.sin(3 * x + t / 100) + 0.3 * x.roll(1, -1)


def oracle(x0: Tensor):
    """The denoiser of a distribution that holds nothing but `x0`."""
    return lambda x, t: (x - acp_at(t) ** 0.5 * x0) / (1 - acp_at(t)) ** 0.5


@pytest.mark.parametrize("grid", [[1], [501, 1], [999, 499], [251, 1], timesteps(20), timesteps(7, spacing="trailing")])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_finds_the_only_picture_there_is(solver, grid):
    x0 = randn(0)
    x = sample(oracle(x0), randn(1), timesteps=grid, noise_source=StepNoise.from_seed(2), solver=solver)
    torch.testing.assert_close(x, x0, atol=1e-4, rtol=1e-4)


def run_diffusers(scheduler, x: Tensor, **options) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(wavy(x, int(t)), t, x, **options).prev_sample
    return x


def test_ddpm_is_diffusers_ddpm():
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(**SD2, timestep_spacing="leading", steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(10)
    expected = run_diffusers(scheduler, randn(1), generator=torch.Generator().manual_seed(5))
    actual = sample(wavy, randn(1), timesteps=timesteps(10), noise_source=StepNoise.from_seed(5))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_solvers_are_diffusers_solvers(solver):
    """On timesteps that diffusers' scheduler chooses itself, sampling agrees with it."""
    import diffusers

    schedulers: dict[str, Callable[[], Any]] = {
        "ddim": lambda: diffusers.DDIMScheduler(**SD2, clip_sample=False, steps_offset=1),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**SD2, timestep_spacing="leading", steps_offset=1),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**SD2, timestep_spacing="leading", steps_offset=1),
    }
    scheduler = schedulers[solver]()
    scheduler.set_timesteps(10)
    grid = scheduler.timesteps.tolist()
    actual = sample(wavy, randn(1), timesteps=grid, noise_source=StepNoise.from_seed(0), solver=solver)
    torch.testing.assert_close(actual, run_diffusers(scheduler, randn(1)), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_equals_single_runs(solver):
    def run(seed: int, x: Tensor) -> Tensor:
        noise = StepNoise.from_seed(seed, len(x))
        return sample(wavy, x + noise(x), timesteps=timesteps(6), noise_source=noise, solver=solver)

    x = randn(0, (3, *SHAPE[1:]))
    singles = torch.cat([run(7 + i, x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(run(7, x), singles, atol=1e-5, rtol=1e-5)


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise = StepNoise.from_seed(3)(torch.empty(SHAPE, dtype=torch.float16))
    assert noise.dtype == torch.float16
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_refuses_another_batch_size():
    with pytest.raises(SettingsError, match="batch of 2 needs as many generators, 1 were given"):
        StepNoise.from_seed(0)(torch.empty(2, 4, 1, 1))


def test_recorded_noise_plays_back_and_ends():
    rows = randn(0, (2, *SHAPE[1:]))
    noise = RecordedNoise(rows)
    assert torch.equal(noise(torch.empty(2, *SHAPE[1:])), rows[:1].expand(2, -1, -1, -1))
    assert torch.equal(noise(torch.empty(SHAPE)), rows[1:])
    with pytest.raises(SettingsError, match="fewer rows"):
        noise(torch.empty(SHAPE))


def test_ddpm_draws_noise_at_every_step_and_solvers_draw_none():
    def draws(solver) -> int:
        drawn: list[Tensor] = []

        def source(like: Tensor) -> Tensor:
            drawn.append(like)
            return torch.zeros_like(like)

        sample(wavy, randn(0), timesteps=timesteps(5), noise_source=source, solver=solver)
        return len(drawn)

    assert {solver: draws(solver) for solver in SOLVERS} == {"ddpm": 5, "ddim": 0, "dpmpp_2m": 0, "unipc": 0}


def test_callback_sees_every_step():
    seen: list[tuple[int, int]] = []
    last: list[Tensor] = []

    def callback(index: int, t: int, x: Tensor) -> None:
        seen.append((index, t))
        last[:] = [x]

    final = sample(wavy, randn(0), timesteps=[501, 1], noise_source=StepNoise.from_seed(0), callback=callback)
    assert seen == [(0, 501), (1, 1)]
    assert last[0] is final


@pytest.mark.parametrize("grid", [[], [1, 501], [501, 501], [1000, 1], [1, -1]])
def test_timesteps_must_fall(grid):
    with pytest.raises(SettingsError, match="must fall"):
        sample(wavy, randn(0), timesteps=grid, noise_source=StepNoise.from_seed(0))


def test_unknown_solver_is_refused():
    with pytest.raises(SettingsError, match="choose one of ddpm, ddim, dpmpp_2m, unipc"):
        sample(wavy, randn(0), timesteps=[1], noise_source=StepNoise.from_seed(0), solver="euler")  # type: ignore[arg-type]


def test_solvers_say_that_diffusers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SettingsError, match=r"install it .* or choose the solver ddpm"):
        sample(wavy, randn(0), timesteps=[1], noise_source=StepNoise.from_seed(0), solver="ddim")


def test_start_points():
    noise, z = randn(0), randn(1)
    assert start_latent(noise, point="noise") is noise
    assert torch.equal(start_latent(noise, z_lr=z, start_timestep=500), lr_embedding(z, noise, 500))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"point": "lr"}, "needs the LR latent of shape .* found none"),
        ({"z_lr": torch.zeros(1, 4, 1, 1)}, r"found one of shape \(1, 4, 1, 1\)"),
        ({"point": "hr"}, "choose one of lr, noise"),
        ({"z_lr": torch.zeros(SHAPE), "start_timestep": 1000}, "start timestep"),
    ],
)
def test_impossible_starts_are_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        start_latent(randn(0), **options)
