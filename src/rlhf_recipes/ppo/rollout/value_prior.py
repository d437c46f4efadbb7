"""The scores that a reward model gives to the prefixes of an answer, as a baseline of the value.

A reward model on a causal transformer scores every prefix of an answer in the same pass that scores the answer. Papers start
the value model from the reward model's weights, which carries the same information but needs a separate model (Stiennon et
al. 2020; Ouyang et al. 2022). Here the prefix scores are added to the output of the value head instead. Adding a function of
the state to the value shapes the reward by its differences and keeps the optimal policy (Ng et al. 1999; Wiewiora 2003).

How well prefix scores predict the final score is not assumed. The baseline is the straight line that least squares fits
through both, over all episodes so far, and it is constant where they are unrelated.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf_recipes.core.tensors import Reduce, masked_sum


class ValuePrior:
    """A least-squares line from the prefix score of a state to the final score of its answer."""

    def __init__(self) -> None:
        # Sums over tokens of 1, x, x^2, y and x y; x is the prefix score, y the final score.
        self.sums = torch.zeros(5, dtype=torch.float64)

    def fit(self, prefix_scores: Tensor, scores: Tensor, mask: Tensor, reduce: Reduce) -> None:
        """Add episodes of all processes to the fit. prefix_scores, mask: (batch, tokens); scores: (batch,) final scores."""
        x, y = prefix_scores.double(), scores.double()[:, None].expand(mask.shape)
        sums = torch.stack([masked_sum(each, mask) for each in (torch.ones_like(x), x, x * x, y, x * y)])
        self.sums += reduce(sums).cpu()

    def __call__(self, prefix_scores: Tensor) -> Tensor:
        """Evaluate the line. (batch, tokens) -> (batch, tokens), float32. The slope is never negative."""
        count, x, squares, y, products = self.sums.tolist()
        spread = squares / count - (x / count) ** 2
        slope = max(0.0, (products / count - x * y / count**2) / spread) if spread > 1e-12 else 0.0
        return (y / count + slope * (prefix_scores.double() - x / count)).float()


def state_prefix_scores(
    scores: Mapping[str, Sequence[object]], weights: Sequence[float] | None, mask: Tensor
) -> Tensor | None:
    """Return the weighted sum of the prefix scores before each generated token, or None where no reward gives any.

    Args:
        scores: what each reward returned; those with an attribute ``prefix_scores`` count (see `ScoresWithPrefixes`).
        weights: one for each reward; None means 1 each. A reward of weight 0 does not count.
        mask: (batch, tokens), True on generated tokens.
    """
    total: Tensor | None = None
    for values, weight in zip(scores.values(), weights or [1.0] * len(scores), strict=True):
        rows: Sequence[Tensor] = getattr(values, "prefix_scores", ())
        if not weight or len(rows) != len(mask) or not all(map(len, rows)):
            continue
        total = torch.zeros(mask.shape) if total is None else total
        for row, (prefix_scores, tokens) in enumerate(zip(rows, mask.sum(1).tolist(), strict=True)):
            before = prefix_scores[-(tokens + 1) : -1]  # the state of a token ends with the token before it
            total[row, tokens - len(before) : tokens] += weight * before
    return None if total is None else total.to(mask.device)
