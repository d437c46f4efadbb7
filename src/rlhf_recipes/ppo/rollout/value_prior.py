"""What the reward models make of an unfinished answer, as the value's first guess.

A reward model on a causal trunk has read every beginning of an answer by the time that it has read the answer. A value that
starts from the reward model's weights starts from those readings (Stiennon et al. 2020; Ouyang et al. 2022), but has to run a
trunk of its own; here they are what the reward model's one pass left. Adding a function of the state to the value in this way is
to shape the reward by its differences, which leaves the best policy what it was (Ng et al. 1999; Wiewiora 2003).

How far the readings tell the score is not taken for granted: the prior is the straight line that least squares draws
through both, over all episodes so far. Where they tell nothing, it is flat.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.core.tensors import Reduce, masked_sum


class ValuePrior:
    """rewards: those whose readings count, with `weights` (1 each if None)."""

    def __init__(self, rewards: Sequence[Any], weights: Sequence[float] | None, on: bool) -> None:
        pairs = zip(rewards, weights or [1.0] * len(rewards), strict=True)
        self.reward_models = [
            (reward_model, weight)
            for reward_model, weight in pairs
            if on and weight and getattr(reward_model, "can_read_along", False)
        ]
        for reward_model, _ in self.reward_models:
            reward_model.reads_along = True
        self.sums = torch.zeros(5, dtype=torch.float64)  # of 1, x, x^2, y, x y over tokens: readings x, scores y

    def forget(self) -> None:
        """Before answers are scored: what was read is of others."""
        for reward_model, _ in self.reward_models:
            reward_model.readings = []

    def readings(self, mask: Tensor) -> Tensor | None:
        """(batch, tokens): what the reward models, added up, read before each generated token of the answers they scored last.

        mask: (batch, tokens), True where a token was generated. None, where no reward model has read them.
        """
        read = [
            (reward_model.readings, weight)
            for reward_model, weight in self.reward_models
            if len(reward_model.readings) == len(mask) and all(map(len, reward_model.readings))
        ]
        if not read:
            return None
        total = torch.zeros(mask.shape)
        for rows, weight in read:
            for row, (reading, tokens) in enumerate(zip(rows, mask.sum(1).tolist(), strict=True)):
                before = reading[
                    -(tokens + 1) : -1
                ]  # the state in which a token is chosen ends with the one before it
                total[row, tokens - len(before) : tokens] += weight * before
        return total.to(mask.device)

    def learn(self, readings: Tensor, scores: Tensor, mask: Tensor, reduce: Reduce) -> None:
        """Take in more episodes, of all processes. readings: (batch, tokens); scores: (batch,), what each earned."""
        x, y = readings.double(), scores.double()[:, None].expand(mask.shape)
        sums = torch.stack([masked_sum(each, mask) for each in (torch.ones_like(x), x, x * x, y, x * y)])
        self.sums += reduce(sums).cpu()

    def __call__(self, readings: Tensor) -> Tensor:
        """(batch, tokens) float32: the line at those readings."""
        count, x, squares, y, products = self.sums.tolist()
        spread = squares / count - (x / count) ** 2
        slope = max(0.0, (products / count - x * y / count**2) / spread) if spread > 1e-12 else 0.0
        return (y / count + slope * (readings.double() - x / count)).float()
