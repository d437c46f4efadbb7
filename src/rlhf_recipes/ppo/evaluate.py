"""Answers held-out prompts, and measures the answers."""

from collections.abc import Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.tensors import Reduce, identity
from rlhf_recipes.data import Prompts
from rlhf_recipes.generation import Completions, row_seed
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.rollout.collect import Generate, RolloutCollector, Score
from rlhf_recipes.ppo.rollout.rollout import as_samples


def prompts_by_set(prompts: Any) -> dict[str, Prompts | None]:
    """Return the held-out prompts by the name of their set; a single set, or None, has the name ""."""
    return prompts if isinstance(prompts, dict) else {"": prompts}


class HeldOutEvaluator:
    """Answers held-out prompts with the same seeds each time; each process takes its share of the prompts."""

    def __init__(self, collector: RolloutCollector, generate: Generate, score: Score, args: PPOConfig) -> None:
        self.collector, self.generate, self.score, self.args = collector, generate, score, args

    def metrics(self, prompts: Prompts | None, reduce: Reduce) -> dict[str, float]:
        """Return means of score, KL, length and EOS share over all processes.

        Raises:
            UserError: fewer prompts than processes.
        """
        if prompts is None or len(prompts) < self.args.world_size:
            raise UserError("there are too few held-out prompts to evaluate on; pass eval_dataset")
        rows, completions, scores = self._answer(prompts, len(prompts))
        weights = self.args.reward_weights
        rollout = self.collector.build_rollout(rows["prompt_ids"], completions, scores, weights, identity, train=False)
        return self.collector.metrics(rollout, scores, reduce)

    def samples(self, sets: Sequence[Prompts | None], tokenizer: Any, count: int | None) -> list[dict[str, Any]]:
        """Return this process's answers to the first `count` prompts (None: all) of each set."""
        samples: list[dict[str, Any]] = []
        for prompts in sets:
            if prompts is None:
                raise UserError("there are no held-out prompts to answer; pass eval_dataset")
            rows, completions, scores = self._answer(prompts, min(len(prompts), count or len(prompts)))
            samples += as_samples(rows, scores, completions, tokenizer)
        return samples

    def _answer(self, prompts: Prompts, count: int) -> tuple[dict[str, Any], Completions, dict[str, Any]]:
        indices = range(self.args.process_index, count, self.args.world_size)
        rows, seeds = prompts.rows(indices), [row_seed(self.args.seed + 1, index) for index in indices]
        completions, scores = self.collector.answer(rows, seeds, self.generate, self.score)
        self.collector.timer.read()  # these seconds belong to no update
        return rows, completions, scores
