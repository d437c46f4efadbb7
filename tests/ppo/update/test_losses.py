"""Tests of the policy and value loss: numbers by hand, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_recipes.ppo.update.losses import policy_losses, value_losses


def log_ratios(*ratios: float) -> Tensor:
    return torch.tensor([ratios], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # a good token, already likelier: clipped at 1.2
        (1.5, -2.0, 3.0, False),  # a bad token made likelier: not clipped
        (0.5, 2.0, -1.0, False),  # a good token made less likely: not clipped
        (0.5, -2.0, 1.6, True),  # a bad token, already less likely: clipped at 0.8
        (1.1, 2.0, -2.2, False),
        (9.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    old = torch.full((1, 1), -3.0, dtype=torch.float64)
    found = policy_losses(old + log_ratios(ratio), old, torch.full_like(old, advantage), 0.2)
    assert found.losses.item() == pytest.approx(loss, abs=1e-12)
    assert found.clipped.item() is clipped


def test_policy_gradient_is_the_ratio_times_the_advantage_unless_clipped() -> None:
    log_probs = log_ratios(1.0, 1.1, 1.5, 1.5, 0.5, 0.5).requires_grad_()
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0, -2.0]], dtype=torch.float64)
    policy_losses(log_probs, torch.zeros_like(log_probs), advantages, 0.2).losses.sum().backward()
    expected = torch.tensor([[-2.0, 2.2, 0.0, 3.0, -1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(log_probs.grad, expected)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (0.1, 0.0, 1.0, 0.405, False),  # inside the range: 0.5 x 0.9^2
        (0.5, 0.0, 1.0, 0.32, True),  # clipped to 0.2, further from the target: 0.5 x 0.8^2
        (-0.5, 0.0, 1.0, 1.125, False),  # moved away from the target: the unclipped error 0.5 x 1.5^2 is larger
        (1.5, 2.0, 1.0, 0.32, True),  # clipped to 1.8
        (3.0, 2.0, 1.0, 2.0, False),
    ],
)
def test_value_loss_by_hand(value: float, old: float, target: float, loss: float, clipped: bool) -> None:
    tensors = [torch.full((1, 1), number, dtype=torch.float64) for number in (value, old, target)]
    found = value_losses(*tensors, 0.2)
    assert found.losses.item() == pytest.approx(loss, abs=1e-12)
    assert found.clipped.item() is clipped


def test_value_gradient_is_the_error_unless_clipped() -> None:
    values = torch.tensor([[0.1, 0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    value_losses(values, torch.zeros_like(values), torch.ones_like(values), 0.2).losses.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, -1.5]], dtype=torch.float64))


def test_a_wide_range_clips_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old, target = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    policy, value = policy_losses(new, old, target, 1e6), value_losses(new, old, target, math.inf)
    torch.testing.assert_close(policy.losses, -target * (new - old).exp())
    torch.testing.assert_close(value.losses, 0.5 * (new - target) ** 2)
    assert not policy.clipped.any() and not value.clipped.any()
