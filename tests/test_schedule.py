"""Noise schedule: timesteps, cumulative alphas, LRE, and the DDPM step."""

from __future__ import annotations

import pytest
import torch

from seesr_core.errors import SettingsError
from seesr_core.method.schedule import (
    acp_at,
    acp_from_sigma,
    alphas_cumprod,
    ddpm_step,
    ddpm_variance,
    exploding_noise,
    lr_embedding,
    sigma_from_acp,
    start_for,
    timesteps,
)


@pytest.mark.parametrize(
    ("steps", "spacing", "start", "expected"),
    [
        (1, "leading", 999, [1]),
        (2, "leading", 999, [501, 1]),
        (4, "leading", 999, [751, 501, 251, 1]),
        (4, "leading", 501, [501, 251, 1]),
        (4, "leading", 500, [251, 1]),
        (4, "leading", 1, [1]),
        (1, "trailing", 999, [999]),
        (2, "trailing", 999, [999, 499]),
        (3, "trailing", 999, [999, 666, 332]),
        (3, "trailing", 700, [666, 332]),
    ],
)
def test_timesteps(steps, spacing, start, expected):
    assert timesteps(steps, spacing=spacing, start_timestep=start) == expected


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 7, 30, 50, 333, 999, 1000])
def test_timesteps_fall_within_the_training_schedule(steps, spacing):
    grid = timesteps(steps, spacing=spacing)
    assert all(earlier > later for earlier, later in zip([1000, *grid], [*grid, -1], strict=True))


def test_fifty_steps_run_from_981_to_1():
    assert timesteps(50) == list(range(981, 0, -20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be between 1 and 1000"),
        ({"steps": 1001}, "steps must be between 1 and 1000"),
        ({"steps": 4, "start_timestep": 1000}, "start timestep must be between 0 and 999"),
        ({"steps": 4, "start_timestep": -1}, "start timestep must be between 0 and 999"),
        ({"steps": 4, "spacing": "karras"}, "leading, trailing"),
        ({"steps": 2, "spacing": "trailing", "start_timestep": 100}, "the lowest is 499"),
    ],
)
def test_impossible_timesteps_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=message):
        timesteps(**arguments)


def test_alphas_fall_from_nearly_one_to_nearly_zero():
    table = alphas_cumprod()
    assert table.shape == (1000,)
    assert (table.diff() < 0).all()
    assert (table[0].item(), table[999].item()) == pytest.approx((1 - 0.00085, 0.00466), abs=1e-5)
    assert acp_at(999) == table[999].item()
    assert acp_at(-1) == 1.0


def test_sigma_and_acp_are_inverse():
    table = alphas_cumprod().double()
    torch.testing.assert_close(acp_from_sigma(sigma_from_acp(table)), table)
    assert sigma_from_acp(0.5) == 1.0
    assert acp_from_sigma(0.0) == 1.0


def test_lr_embedding_has_the_variance_of_its_timestep():
    z, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0)
    expected = acp_at(500) ** 0.5 + 2.0 * (1 - acp_at(500)) ** 0.5
    torch.testing.assert_close(lr_embedding(z, noise, 500), torch.full_like(z, expected))
    with pytest.raises(SettingsError, match="start timestep"):
        lr_embedding(z, noise, 1000)


@pytest.mark.parametrize(("t", "previous"), [(981, 961), (501, 1), (999, 666)])
def test_ddpm_step_keeps_the_forward_process(t, previous):
    """Given the true noise and no new one, the step lands on the mean of q(x_previous | x_t, x_0), Ho et al. (7)."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float32) for _ in range(2))
    x = lr_embedding(x0, eps, t)
    beta = 1 - acp_at(t) / acp_at(previous)
    mean = (acp_at(previous) ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - acp_at(previous)) * x) / (1 - acp_at(t))
    torch.testing.assert_close(ddpm_step(eps, t, x, torch.zeros_like(x), previous=previous), mean, atol=1e-5, rtol=1e-4)


def test_ddpm_noise_is_scaled_by_the_posterior_variance():
    zero, one = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    step = ddpm_step(zero, 501, zero, one, previous=1)
    torch.testing.assert_close(step, one * ddpm_variance(501, previous=1) ** 0.5)
    assert ddpm_variance(1, previous=-1) == 1e-20


def test_half_precision_latents_are_stepped_in_float32():
    generator = torch.Generator().manual_seed(1)
    x, eps, noise = (torch.randn(1, 4, 4, 4, generator=generator).half() for _ in range(3))
    step = ddpm_step(eps, 501, x, noise, previous=1)
    assert step.dtype == torch.float16
    assert torch.equal(step, ddpm_step(eps.float(), 501, x.float(), noise.float(), previous=1).half())


@pytest.mark.parametrize(("start", "first"), [(999, 981), (999, 999), (500, 401), (1, 1)])
@pytest.mark.parametrize("from_pure_noise", [False, True])
def test_a_variance_exploding_sampler_shows_its_network_the_lr_embedding(start, first, from_pure_noise):
    z, noise = torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).unbind()
    sigma = sigma_from_acp(acp_at(first))
    scale = (1 + sigma**2) ** 0.5 if from_pure_noise else sigma
    given = exploding_noise(z, noise, acp=acp_at(start), sigma=sigma, scale=scale)
    seen = (z + scale * given) / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(seen, lr_embedding(z, noise, start), atol=2e-6, rtol=0)


def test_without_an_embedding_the_network_sees_the_noise_itself():
    noise = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    given = exploding_noise(torch.zeros_like(noise), noise, acp=0.0, sigma=8.0, scale=8.0)
    torch.testing.assert_close(8.0 * given / 65**0.5, noise)


@pytest.mark.parametrize(
    ("steps", "start", "expected"),
    [
        (50, 999, 999),  # as published, above 981
        (2, 999, 999),  # above 501, the whole step above it
        (7, 999, 999),  # above 853; steps are rounded down, so that this is a little more than one
        (60, 999, 999),  # above 945, many steps but hardly less noise
        (50, 251, 251),
        (1, 999, 1),
        (334, 999, 667),  # rounded down so far that the picture would keep a third of its noise
    ],
)
def test_an_embedding_far_above_the_first_timestep_begins_there(steps, start, expected):
    assert start_for(timesteps(steps, start_timestep=start), start) == expected
