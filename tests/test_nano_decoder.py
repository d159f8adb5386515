"""The decoder's tuning: its critic, its losses, and whose gradient goes where."""

import math

import pytest
import torch

from trainer.nano.decoder import Critic, interpolated, largest_singular_value, texture_strength, uneven


def test_power_iteration_finds_the_largest_singular_value():
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0)) + 0.5
    assert float(largest_singular_value(matrix, 50)) == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-4)


def test_the_largest_singular_value_can_be_learnt_through():
    matrix = torch.randn(8, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    largest_singular_value(matrix, 100).backward()
    u, _, v = torch.linalg.svd(matrix.detach(), full_matrices=False)
    torch.testing.assert_close(matrix.grad, torch.outer(u[:, 0], v[0]), atol=1e-3, rtol=1e-3)


def test_the_critic_judges_patches_of_the_pair():
    critic = Critic(4)
    image, condition = torch.randn(2, 2, 3, 32, 24, generator=torch.Generator().manual_seed(2))
    verdict, features = critic(image, condition)
    assert verdict.shape == (2, 1, 8, 6)
    assert len(features) == 4
    assert not torch.equal(verdict, critic(image, condition.flip(3))[0])


def _checkers(contrast: float) -> torch.Tensor:
    return ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1).mul(contrast).expand(1, 3, 32, 32)


def test_texture_strength_grows_with_contrast_by_its_logarithm():
    weak, strong = (texture_strength(_checkers(contrast), floor=0)[:, :3] for contrast in (0.1, 0.2))
    torch.testing.assert_close(strong - weak, torch.full_like(weak, math.log(2)), atol=1e-3, rtol=0)


def test_neither_flat_areas_nor_slow_changes_are_texture():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    flat = texture_strength(torch.full((1, 3, 64, 64), 0.3))
    torch.testing.assert_close(flat, torch.full_like(flat, math.log(0.01)), atol=0.02, rtol=0)
    assert float(texture_strength(ramp)[..., 2:-2].max()) < math.log(0.012)


def test_texture_strength_is_local():
    half = torch.cat([torch.zeros(1, 3, 32, 16), _checkers(0.5)[..., 16:]], dim=3)
    strength = texture_strength(half)[:, :3]
    assert float(strength[..., 0].max()) < -4
    assert float(strength[..., -1].min()) > -1


def test_too_much_detail_costs_more_than_too_little():
    difference = torch.tensor([0.5, 0.5])
    assert float(uneven(difference, 3)) == pytest.approx(3 * float(uneven(-difference, 3)))
    assert float(uneven(difference, 1)) == pytest.approx(0.5)


def test_colours_say_nothing_to_the_critic():
    critic = Critic(4)
    image, condition = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    verdict, shifted = (
        critic(image, condition)[0],
        critic(image + torch.tensor([0.3, -0.2, 0.1])[:, None, None], condition)[0],
    )
    torch.testing.assert_close(shifted, verdict, atol=1e-5, rtol=1e-4)


def test_the_decoder_that_ships_lies_between_before_and_after():
    before = {"encoder.a": torch.zeros(2), "decoder.a": torch.zeros(2)}
    after = {"critic.a": torch.ones(2), "decoder.a": torch.full((2,), 4.0)}
    assert {name: tensor.tolist() for name, tensor in interpolated(before, after, 0.25).items()} == {
        "decoder.a": [1, 1]
    }
