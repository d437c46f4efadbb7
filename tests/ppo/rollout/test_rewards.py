"""Tests of token rewards: numbers by hand, and KL estimators that average to the KL divergence."""

import math

import pytest
import torch

from rlhf_recipes.ppo.rollout.rewards import kl_estimates, penalize_missing_eos, token_rewards


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_average_to_the_kl_divergence(estimator: str) -> None:
    """The mean over all tokens under the policy is KL(policy, reference), not KL(reference, policy)."""
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    divergence = 0.7 * math.log(0.7 / 0.3) + 0.2 * math.log(0.2 / 0.3) + 0.1 * math.log(0.1 / 0.4)
    estimates = kl_estimates(policy.log()[None], reference.log()[None], estimator)[0]
    assert (policy * estimates).sum().item() == pytest.approx(divergence, abs=1e-8)
    reverse = kl_estimates(reference.log()[None], policy.log()[None], estimator)[0]
    assert (reference * reverse).sum().item() != pytest.approx(divergence, abs=0.02)


def test_kl_estimators_by_hand() -> None:
    policy, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -3.0]])
    torch.testing.assert_close(kl_estimates(policy, reference, "k1"), torch.tensor([[0.5, -1.0, 0.0]]))
    k3 = torch.tensor([[math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0, 0.0]])
    torch.testing.assert_close(kl_estimates(policy, reference, "k3"), k3)
    assert bool((k3 >= 0).all())


def test_missing_eos_penalty_by_hand() -> None:
    scores, stopped = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([True, False, False])
    assert penalize_missing_eos(scores, stopped, 0.5).tolist() == [2.0, 1.5, -1.5]
    assert penalize_missing_eos(scores, stopped, 0.0).tolist() == scores.tolist()
    assert penalize_missing_eos(scores, stopped, None).tolist() == scores.tolist()


def test_the_score_is_added_to_the_last_generated_token() -> None:
    nan = math.nan
    kl = torch.tensor([[0.5, -1.0, 2.0], [4.0, nan, nan], [nan, nan, nan]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    rewards = token_rewards(torch.tensor([10.0, -3.0, 99.0]), kl, mask, 0.1)
    expected = torch.tensor([[-0.05, 0.1, 9.8], [-3.4, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_token_rewards_accept_answers_without_tokens() -> None:
    empty = torch.zeros(2, 0)
    assert token_rewards(torch.ones(2), empty, empty.bool(), 0.1).shape == (2, 0)
