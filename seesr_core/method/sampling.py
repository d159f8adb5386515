"""The sampling loop, its noise and its start. A denoiser is any callable (x_B4hw, t) -> eps of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import SettingsError
from .schedule import LAST_TIMESTEP, acp_at, ddpm_step, lr_embedding

Denoise = Callable[[Tensor, int], Tensor]
NoiseSource = Callable[[Tensor], Tensor]
Callback = Callable[[int, int, Tensor], None]
Solver = Literal["ddpm", "ddim", "dpmpp_2m", "unipc"]
StartPoint = Literal["lr", "noise"]

SOLVERS: tuple[Solver, ...] = ("ddpm", "ddim", "dpmpp_2m", "unipc")
START_POINTS: tuple[StartPoint, ...] = ("lr", "noise")


class StepNoise:
    """Standard normal noise, image i of a batch from its own CPU generator, so that a batch equals single runs.

    Called with a tensor (B, …), it returns the next noise of that shape on that device, in that dtype.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = tuple(generators)

    @classmethod
    def from_seed(cls, seed: int, batch: int = 1) -> StepNoise:
        """Generators seeded `seed`, `seed + 1`, … for a batch of `batch` images."""
        return cls([torch.Generator("cpu").manual_seed(seed + i) for i in range(batch)])

    def __call__(self, like: Tensor) -> Tensor:
        if len(like) != len(self._generators):
            raise SettingsError(
                f"Noise for a batch of {len(like)} needs as many generators, {len(self._generators)} were given."
            )
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in self._generators]
        return torch.stack(noise).to(device=like.device, dtype=like.dtype)


class RecordedNoise:
    """Noise that was drawn elsewhere: call i returns row i of `noise_S4hw`, the same for every image of the batch."""

    def __init__(self, noise_S4hw: Tensor) -> None:
        self._rows = iter(noise_S4hw)

    def __call__(self, like: Tensor) -> Tensor:
        row = next(self._rows, None)
        if row is None:
            raise SettingsError("The recorded noise has fewer rows than the sampler has steps.")
        return row.to(like).expand_as(like)


class _Stepper(Protocol):
    def __call__(self, eps: Tensor, index: int, x: Tensor) -> Tensor: ...


def start_latent(
    noise: Tensor, *, point: StartPoint = "lr", z_lr: Tensor | None = None, start_timestep: int = LAST_TIMESTEP
) -> Tensor:
    """Where sampling starts, (B, 4, h, w): the noised LR latent ("lr", LRE) or `noise` itself ("noise").

    `z_lr` is the scaled latent of the prepared LR image; only "lr" needs it.

    Raises:
        SettingsError: unknown `point`, a missing or differently shaped `z_lr`, or a bad `start_timestep`.
    """
    if point == "noise":
        return noise
    if point != "lr":
        raise SettingsError(f"Unknown start point {point!r}: choose one of {', '.join(START_POINTS)}.")
    if z_lr is None or z_lr.shape != noise.shape:
        found = "none" if z_lr is None else f"one of shape {tuple(z_lr.shape)}"
        raise SettingsError(f"Start point 'lr' needs the LR latent of shape {tuple(noise.shape)}, found {found}.")
    return lr_embedding(z_lr, noise, start_timestep)


def sample(
    denoise: Denoise,
    x_start: Tensor,
    *,
    timesteps: Sequence[int],
    noise_source: NoiseSource,
    solver: Solver = "ddpm",
    callback: Callback | None = None,
) -> Tensor:
    """Denoise `x_start` (B, 4, h, w) along `timesteps` (falling, see `schedule.timesteps`) to a clean latent.

    "ddpm" is the published sampler: one noise is drawn at every step, the last included. "ddim" (η = 0), "dpmpp_2m"
    and "unipc" are diffusers' solvers on the same timesteps and draw none. `callback(index, t, x)` follows each step.

    Raises:
        SettingsError: unknown solver, timesteps that do not fall, or diffusers missing for its solvers.
    """
    _check_falling(timesteps)
    step = _stepper(solver, timesteps, noise_source)
    x = x_start
    for index, t in enumerate(timesteps):
        x = step(denoise(x, t), index, x)
        if callback is not None:
            callback(index, t, x)
    return x


def _check_falling(timesteps: Sequence[int]) -> None:
    bounded = [LAST_TIMESTEP + 1, *timesteps, -1]
    if len(timesteps) == 0 or any(later >= earlier for earlier, later in pairwise(bounded)):
        raise SettingsError(f"Timesteps must fall strictly within {LAST_TIMESTEP} … 0, found {list(timesteps)}.")


def _stepper(solver: str, timesteps: Sequence[int], noise_source: NoiseSource) -> _Stepper:
    if solver == "ddpm":
        return _ddpm_stepper(timesteps, noise_source)
    if solver in SOLVERS:
        return _diffusers_stepper(solver, timesteps)
    raise SettingsError(f"Unknown solver {solver!r}: choose one of {', '.join(SOLVERS)}.")


def _ddpm_stepper(timesteps: Sequence[int], noise_source: NoiseSource) -> _Stepper:
    after = [*timesteps[1:], -1]

    def step(eps: Tensor, index: int, x: Tensor) -> Tensor:
        return ddpm_step(eps, timesteps[index], x, noise_source(x), previous=after[index])

    return step


def _diffusers_stepper(solver: str, timesteps: Sequence[int]) -> _Stepper:
    scheduler = _spaced_scheduler(solver, timesteps)

    def step(eps: Tensor, index: int, x: Tensor) -> Tensor:
        stepped: Tensor = scheduler.step(eps.float(), len(timesteps) - 1 - index, x.float(), return_dict=False)[0]
        return stepped.to(x.dtype)

    return step


def _spaced_scheduler(solver: str, timesteps: Sequence[int]) -> Any:
    """diffusers' scheduler of a process that has only `timesteps`, numbered n − 1 … 0.

    Left to themselves the schedulers space "leading" timesteps differently from each other and from DDPM, and not all
    can be given a list. A chain of just these timesteps, by its betas, makes any list and any start exact.
    """
    ascending = [acp_at(t) for t in reversed(timesteps)]
    betas = [1.0 - acp / before for before, acp in pairwise([1.0, *ascending])]
    scheduler_class, options = _scheduler_class(solver)
    scheduler = scheduler_class(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        timestep_spacing="trailing",
        prediction_type="epsilon",
        **options,
    )
    scheduler.set_timesteps(len(betas))
    return scheduler


def _scheduler_class(solver: str) -> tuple[Any, dict[str, Any]]:
    try:
        import diffusers
    except ImportError as error:
        raise SettingsError(
            f"Solver {solver!r} is diffusers' own: install it (pip install diffusers) or choose the solver ddpm."
        ) from error
    if solver == "ddim":
        return diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}
    if solver == "dpmpp_2m":
        return diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}
    return diffusers.UniPCMultistepScheduler, {"solver_order": 2}
