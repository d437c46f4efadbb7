"""PPO in NumPy and float64, one episode and one token at a time: the reference that the trainer must match.

Written from the papers' formulas and nothing else; it imports no line of what it checks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = np.ndarray


@dataclass
class Episode:
    """One answer without padding; each array holds one float64 number per generated token."""

    log_probs: Row
    reference_log_probs: Row
    values: Row
    score: float
    stopped: bool
    kl: Row = field(default_factory=lambda: np.zeros(0))
    rewards: Row = field(default_factory=lambda: np.zeros(0))
    advantages: Row = field(default_factory=lambda: np.zeros(0))
    returns: Row = field(default_factory=lambda: np.zeros(0))


def complete_(
    episodes: Sequence[Episode],
    *,
    kl_coef: float = 0.05,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
    missing_eos_penalty: float | None = None,
) -> None:
    """Fill in KL, rewards, advantages and returns; `score` becomes the score that is trained on."""
    for episode in episodes:
        difference = episode.log_probs - episode.reference_log_probs
        episode.kl = difference if kl_estimator == "k1" else np.exp(-difference) - 1 + difference
        if missing_eos_penalty is not None and not episode.stopped:
            episode.score -= missing_eos_penalty
        episode.rewards = -kl_coef * episode.kl
        if len(episode.rewards):
            episode.rewards[-1] += episode.score
    if whiten_rewards:
        every_token = flat(episode.rewards for episode in episodes)
        for episode in episodes:
            episode.rewards = (episode.rewards - every_token.mean()) / every_token.std(ddof=1) + every_token.mean()
    for episode in episodes:
        episode.advantages = advantages_of(episode.rewards, episode.values, gamma, lam)
        episode.returns = episode.advantages + episode.values
    every_token = flat(episode.advantages for episode in episodes)
    for episode in episodes:
        episode.advantages = (episode.advantages - every_token.mean()) / every_token.std(ddof=1)


def advantages_of(rewards: Row, values: Row, gamma: float, lam: float) -> Row:
    """Return the sums over later tokens of (gamma lam)^distance times their temporal-difference error."""
    after = np.append(values, 0.0)
    errors = [rewards[t] + gamma * after[t + 1] - after[t] for t in range(len(rewards))]
    sums = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(errors))) for t in range(len(errors))]
    return np.array(sums, dtype=np.float64)


def policy_loss(new: float, old: float, advantage: float, cliprange: float) -> tuple[float, bool]:
    """Return the negated minimum of the two surrogates, and whether the clipped one was smaller."""
    ratio = math.exp(new - old)
    free, held = ratio * advantage, min(max(ratio, 1 - cliprange), 1 + cliprange) * advantage
    return -min(free, held), held < free


def value_loss(new: float, old: float, wanted: float, cliprange: float) -> tuple[float, bool]:
    """Return half of the larger squared error, and whether that was the clipped one."""
    held = min(max(new, old - cliprange), old + cliprange)
    return 0.5 * max((new - wanted) ** 2, (held - wanted) ** 2), (held - wanted) ** 2 > (new - wanted) ** 2


def flat(rows: Iterable[Row]) -> Row:
    return np.concatenate([np.asarray(row, dtype=np.float64) for row in rows])


@dataclass
class AnswerOutputs:
    """Log-probabilities, entropies and values of one answer at a temperature, in float64 from all logits."""

    log_probs: Row
    entropies: Row
    values: Row


def forward(model: Any, prompt: Sequence[int], answer: Sequence[int], temperature: float) -> AnswerOutputs:
    """Run the model on one answer without padding.

    model: a `PolicyAndValue`, or a causal language model, whose values are zero.
    """
    import torch

    policy = getattr(model, "policy", model)
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        output = policy(ids, output_hidden_states=True)
        logits = output.logits[0].double().numpy()[len(prompt) - 1 : -1] / temperature
        if policy is model:
            values = torch.zeros(len(answer))
        elif hasattr(model.value_model, "config"):
            values = model.value_model.score(model.value_model.transformer(ids).last_hidden_state)[
                0, len(prompt) - 1 : -1, 0
            ]
        else:
            values = model.value_model.score(output.hidden_states[-1])[0, len(prompt) - 1 : -1, 0]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    chosen = probabilities[np.arange(len(answer)), list(answer)]
    entropies = -(probabilities * np.log(probabilities)).sum(-1)
    return AnswerOutputs(np.log(chosen), entropies, values.double().numpy())
