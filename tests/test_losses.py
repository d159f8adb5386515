"""Both training losses: their formulas, and the published numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seesr_core.method.losses import noise_loss, prompt_loss

from .golden import golden_dir
from .parity.groups import losses


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts(seed: int) -> tuple[Tensor, Tensor]:
    return normal(2, 5, 3, seed=seed), normal(2, 7, seed=seed + 1)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_equation_1_is_the_mean_square_plus_the_weighted_cross_entropy(weight: float) -> None:
    (tokens, logits), (target_tokens, target_logits) = prompts(0), prompts(10)
    loss = prompt_loss(tokens, logits, target_tokens, target_logits, weight=weight)
    p, y = logits.double().sigmoid(), target_logits.double().sigmoid()
    cross_entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    square = (tokens.double() - target_tokens.double()).pow(2).mean()
    torch.testing.assert_close(loss.tokens.double(), square, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.logits.double(), cross_entropy, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.total.double(), square + weight * cross_entropy, rtol=1e-6, atol=0)


def test_equation_1_is_least_where_student_and_teacher_agree() -> None:
    target_tokens, target_logits = prompts(0)
    tokens, logits = (tensor.clone().requires_grad_(True) for tensor in prompts(0))
    loss = prompt_loss(tokens, logits, target_tokens, target_logits).total
    for gradient in torch.autograd.grad(loss, (tokens, logits)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)


def test_the_teacher_gets_no_gradient() -> None:
    tokens, logits = (tensor.requires_grad_(True) for tensor in prompts(0))
    target_tokens, target_logits = (tensor.requires_grad_(True) for tensor in prompts(10))
    prompt_loss(tokens, logits, target_tokens, target_logits).total.backward()
    assert [tensor.grad is None for tensor in (tokens, logits, target_tokens, target_logits)] == [False] * 2 + [
        True
    ] * 2


def test_a_sure_but_wrong_tag_costs_its_logit_and_not_infinity() -> None:
    tokens, logits = torch.zeros(1, 1, 1), torch.tensor([[200.0]])
    loss = prompt_loss(tokens, logits, tokens, -logits)
    assert loss.logits.item() == pytest.approx(200.0)


def test_losses_are_single_precision_whatever_the_networks_compute_in() -> None:
    tokens, logits = (tensor.bfloat16() for tensor in prompts(0))
    target_tokens, target_logits = (tensor.bfloat16() for tensor in prompts(10))
    half = prompt_loss(tokens, logits, target_tokens, target_logits)
    single = prompt_loss(tokens.float(), logits.float(), target_tokens.float(), target_logits.float())
    assert [float(a) for a in half] == [float(b) for b in single]
    assert noise_loss(tokens, target_tokens) == noise_loss(tokens.float(), target_tokens.float())


def test_equation_2_is_the_mean_square_of_the_noise() -> None:
    pred, noise = normal(2, 4, 3, 3, seed=0), normal(2, 4, 3, 3, seed=1)
    expected = (pred.double() - noise.double()).pow(2).mean()
    torch.testing.assert_close(noise_loss(pred, noise).double(), expected, rtol=1e-6, atol=0)


def test_stage_2_meets_the_published_loss_and_gradients() -> None:
    lines = list(losses.cases(golden_dir(), full=False))
    assert {"loss", "pred", "grad_norms/expected", "n_params"} <= {line.quantity for line in lines}
    assert [line.line() for line in lines if not line.ok] == []


@pytest.mark.slow
def test_stage_1_meets_the_published_loss_and_gradients() -> None:
    folder = golden_dir()
    names = [path.name.removesuffix("_meta.json") for path in (folder / losses.GROUP).glob("stage1_*_meta.json")]
    lines = [line for name in names for line in losses.stage1_cases(folder, name)]
    assert {"l_fea", "l_logits", "grad_norms/expected"} <= {line.quantity for line in lines}
    assert [line.line() for line in lines if not line.ok] == []
