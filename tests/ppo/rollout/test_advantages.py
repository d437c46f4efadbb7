"""Tests of generalized advantage estimation: against numbers by hand and the sum that defines it."""

import numpy as np
import torch
from torch import Tensor

from rlhf_recipes.core.tensors import length_mask
from rlhf_recipes.ppo.rollout.advantages import generalized_advantages

GAMMA, LAM = 0.9, 0.8
LENGTHS = [5, 3, 1, 0]


def random_episodes(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(LENGTHS), 5, generator=generator, dtype=torch.float64)
    return rewards, values, length_mask(torch.tensor(LENGTHS), 5)


def advantage_by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> np.ndarray:
    """Sum (gamma lam)^distance times the TD error over the later tokens; the value after the last token is 0."""
    r, v = rewards.numpy(), np.append(values.numpy(), 0.0)
    td_errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return np.array([sum((gamma * lam) ** (k - t) * td_errors[k] for k in range(t, len(r))) for t in range(len(r))])


def test_gae_of_three_tokens_by_hand() -> None:
    # Errors: 3 - 0.125 = 2.875; 2 + 0.9 x 0.125 - 0.25 = 1.8625; 1 + 0.9 x 0.25 - 0.5 = 0.725.
    # Advantages: 2.875; 1.8625 + 0.72 x 2.875 = 3.9325; 0.725 + 0.72 x 3.9325 = 3.5564.
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 0.25, 0.125]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    expected = torch.tensor([[3.5564, 3.9325, 2.875]])
    torch.testing.assert_close(generalized_advantages(rewards, values, mask, GAMMA, LAM), expected)


def test_gae_matches_its_definition_as_a_sum() -> None:
    rewards, values, mask = random_episodes()
    advantages = generalized_advantages(rewards, values, mask, GAMMA, LAM)
    for row, length in enumerate(LENGTHS):
        expected = advantage_by_definition(rewards[row, :length], values[row, :length], GAMMA, LAM)
        np.testing.assert_allclose(advantages[row, :length], expected, rtol=0, atol=1e-12)


def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value() -> None:
    rewards, values, mask = random_episodes(1)
    advantages = generalized_advantages(rewards, values, mask, GAMMA, 1.0)
    later = [sum(GAMMA**step * rewards[0, start + step] for step in range(5 - start)) for start in range(5)]
    torch.testing.assert_close(advantages[0], torch.stack(later) - values[0])


def test_gae_with_lambda_zero_is_the_one_step_td_error() -> None:
    rewards, values, mask = random_episodes(2)
    advantages = generalized_advantages(rewards, values, mask, GAMMA, 0.0)
    torch.testing.assert_close(advantages[0, :4], rewards[0, :4] + GAMMA * values[0, 1:] - values[0, :4])
    torch.testing.assert_close(advantages[0, 4], rewards[0, 4] - values[0, 4])


def test_a_perfect_value_gives_zero_advantages() -> None:
    rewards, _, mask = random_episodes(3)
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
    values = rewards.flip(1).cumsum(1).flip(1)  # the undiscounted sum of later rewards
    advantages = generalized_advantages(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)


def test_gae_ignores_padding() -> None:
    rewards, values, mask = random_episodes()
    advantages = generalized_advantages(rewards, values, mask, GAMMA, LAM)
    nan = torch.full_like(rewards, torch.nan)
    padded_with_nan = generalized_advantages(rewards.where(mask, nan), values.where(mask, nan), mask, GAMMA, LAM)
    assert torch.equal(padded_with_nan, advantages) and bool((advantages[~mask] == 0).all())
    wider = [torch.cat([tensor, torch.full_like(tensor, 7)], dim=1) for tensor in (rewards, values)]
    wide_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    assert torch.equal(generalized_advantages(*wider, wide_mask, GAMMA, LAM)[:, :5], advantages)


def test_gae_accepts_answers_without_tokens() -> None:
    empty = torch.zeros(2, 0)
    assert generalized_advantages(empty, empty, empty.bool(), GAMMA, LAM).shape == (2, 0)
