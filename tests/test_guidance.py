"""The fidelity dial and guidance by a mask, against their formulas written out."""

from __future__ import annotations

import pytest
import torch

from seesr_core.method.guidance import guided, pull, pulled_noise, targeted
from seesr_core.method.schedule import acp_at, sigma_from_acp

from .dape_nets import seeded


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def test_targeted_guidance_is_the_negative_plus_the_masked_difference() -> None:
    negative, positive, share = normal(2, 4, 3, 5), normal(2, 4, 3, 5, seed=1), torch.rand(1, 1, 3, 5)
    expected = negative + 5.5 * share * (positive - negative)
    torch.testing.assert_close(guided(negative, targeted(negative, positive, share), 5.5), expected)


def test_full_and_no_share_are_exact() -> None:
    negative, positive = normal(1, 4, 2, 2), normal(1, 4, 2, 2, seed=1)
    share = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    found = targeted(negative, positive, share)
    assert torch.equal(found[..., 0], positive[..., 0])
    assert torch.equal(found[..., 1], negative[..., 1])


@pytest.mark.parametrize(("fidelity", "decay", "expected"), [(0.5, 4.0, 0.03125), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0)])
def test_the_pull_falls_with_the_noise(fidelity: float, decay: float, expected: float) -> None:
    assert pull(fidelity, decay, 5.0, 10.0) == pytest.approx(expected)
    assert pull(fidelity, decay, 10.0, 10.0) == fidelity


@pytest.mark.parametrize("timestep", [981, 251, 1])
def test_the_pulled_noise_implies_the_pulled_clean_latent(timestep: int) -> None:
    x, eps, z_lr = (normal(1, 4, 6, 6, seed=seed) for seed in range(3))
    acp = acp_at(timestep)
    x0 = (x.double() - (1 - acp) ** 0.5 * eps.double()) / acp**0.5
    wanted = x0 + 0.3 * (z_lr.double() - x0)
    found = pulled_noise(eps, x, z_lr, 0.3, acp).double()
    implied = (x.double() - (1 - acp) ** 0.5 * found) / acp**0.5
    torch.testing.assert_close(implied, wanted, rtol=1e-4, atol=1e-4)
    assert sigma_from_acp(acp) > 0


def test_no_pull_gives_the_very_prediction_back() -> None:
    eps = normal(1, 4, 2, 2)
    assert pulled_noise(eps, eps, eps, 0.0, 0.5) is eps
