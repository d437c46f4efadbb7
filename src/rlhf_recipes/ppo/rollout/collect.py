"""Collects rollouts: answers, their scores, and what policy, reference and value give for every generated token."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.core.tensors import MaskedMeans, Reduce, batches_by_length
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.generation import Completions
from rlhf_recipes.models import context_length
from rlhf_recipes.optimizations import TILE, cached_casts, without_cudnn_attention
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.roles.build import Reference
from rlhf_recipes.ppo.roles.outputs import policy_outputs
from rlhf_recipes.ppo.roles.value import PolicyAndValue
from rlhf_recipes.ppo.rollout.rewards import KLCoefficient, ScoreScale
from rlhf_recipes.ppo.rollout.rollout import RewardOptions, Rollout, finish_rollout, in_batches, pad_episodes
from rlhf_recipes.ppo.rollout.timer import PhaseTimer
from rlhf_recipes.ppo.rollout.value_prior import ValuePrior, state_prefix_scores
from rlhf_recipes.scoring import Scores
from rlhf_recipes.system import is_sharded, tokens_per_forward, unsharded_weights

Generate = Callable[[Sequence[Sequence[int]], Sequence[int]], Completions]  # (prompt ids, seeds) -> completions
Score = Callable[[Mapping[str, Any], Completions], dict[str, Scores]]  # (rows of `Prompts`, completions) -> scores


class RolloutCollector:
    """Makes rollouts, and owns what changes with them: the KL coefficient, the score scale and the value prior.

    timer: gets the seconds of each phase.
    """

    def __init__(
        self, model: PolicyAndValue, reference: Reference, accelerator: Any, args: PPOConfig, timer: PhaseTimer
    ) -> None:
        self.model, self.reference = model, reference
        self.accelerator, self.args, self.timer = accelerator, args, timer
        # In bfloat16, rounding may depend on the width, unless it is a multiple of TILE; that must fit the context.
        bfloat16 = args.bf16 or next(model.policy.parameters()).dtype == torch.bfloat16
        fits = (context_length(base_model(model.policy).config) or TILE) % TILE == 0
        self.width_multiple = TILE if bfloat16 and fits else 1
        self.max_tokens = tokens_per_forward(args.device, bfloat16)
        self.kl_coef = KLCoefficient(args.kl_coef, args.adaptive_kl_target, args.adaptive_kl_horizon)
        clip = args.reward_clip_range
        self.scale = ScoreScale(
            args.use_score_scaling, args.use_score_norm, None if clip is None else (clip[0], clip[1])
        )
        self.value_prior = ValuePrior()
        self._warmed_up = False

    def answer(
        self, rows: Mapping[str, Any], seeds: Sequence[int], generate: Generate, score: Score
    ) -> tuple[Completions, dict[str, Scores]]:
        """Sample an answer to each prompt and score it. rows: from `Prompts.rows`; seeds: one a row."""
        self._warm_up_sharded()
        with unsharded_weights(self.model, self.accelerator):
            with self.timer.time("generate"):
                completions = generate(rows["prompt_ids"], seeds)
            with self.timer.time("score"):
                return completions, score(rows, completions)

    @torch.no_grad()
    def _warm_up_sharded(self) -> None:
        """Run the whole module once on two tokens: FSDP2 needs that before any part of it is run by itself."""
        if self._warmed_up or not is_sharded(self.model):
            return
        self._warmed_up = True
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.args.device)
        self.model(ids, torch.ones_like(ids), torch.ones(1, 1, dtype=torch.bool, device=self.args.device))

    def build_rollout(
        self,
        queries: Sequence[Sequence[int]],
        completions: Completions,
        scores: Mapping[str, Scores],
        weights: Sequence[float] | None,
        reduce: Reduce,
        train: bool = True,
    ) -> Rollout:
        """Return this process's episodes of an update.

        Args:
            queries: the ids of each prompt.
            scores: by reward; they are summed with `weights` (1 each if None).
            train: update the score scale and the value prior with the scores of all processes. False in an evaluation: then no
                statistics change, and the value prior is not added.
        """
        device = self.args.device
        episodes = {name: tensor.to(device) for name, tensor in pad_episodes(queries, completions.ids).items()}
        mask = episodes["response_mask"]
        with unsharded_weights(self.model, self.accelerator):
            log_probs, reference_log_probs, values = self._run_models(episodes)
        totals, token_totals = sum_rewards(scores, weights, mask)
        totals = self.scale(totals, reduce, train)
        prefix_scores = state_prefix_scores(scores, weights, mask) if train else None
        if prefix_scores is not None:
            final_scores = totals if token_totals is None else totals + token_totals.sum(1)
            self.value_prior.fit(prefix_scores, final_scores, mask, reduce)
            episodes["baseline"] = torch.where(mask, self.value_prior(prefix_scores), torch.zeros_like(values))
            values = values + episodes["baseline"]
        return finish_rollout(
            episodes,
            torch.tensor(completions.stopped, device=device),
            totals,
            log_probs,
            reference_log_probs,
            values,
            RewardOptions.of(self.args, kl_coef=self.kl_coef.value),
            reduce,
            token_totals,
        )

    def _run_models(self, episodes: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return policy log-probabilities, reference log-probabilities and values, (batch, tokens) each.

        With frozen lower layers, add their hidden states to `episodes`.
        """
        batches, temperature = self._batches(episodes["attention_mask"]), self.args.temperature
        if self.model.lower is not None:
            (episodes["lower_states"],) = self._forward(self.model.lower_outputs, episodes, batches)
        log_probs, _, values = self._forward(partial(self.model, temperature=temperature), episodes, batches)
        with self.reference.active() as module:
            outputs = partial(policy_outputs, module, temperature=temperature, vocabulary=self.model.vocabulary)
            (reference_log_probs,) = self._forward(
                lambda **columns: (outputs(**columns)[1],), episodes, batches, module
            )
        return log_probs, reference_log_probs, values

    def _batches(self, attention_mask: Tensor) -> list[list[int]]:
        """Return batches of rows of similar length.

        With one minibatch on a CPU these are exactly the pieces that are trained on, so that the probability ratio starts at
        exactly 1: in bfloat16, rounding can depend on the shape of a batch. Otherwise it starts at 1 up to rounding.
        """
        args, lengths = self.args, attention_mask.sum(1).tolist()
        if args.num_mini_batches > 1 or args.device.type != "cpu":
            return batches_by_length(lengths, args.local_rollout_forward_batch_size, self.max_tokens)
        pieces = []
        order = torch.tensor(lengths).argsort(stable=True)
        for rows in order.split(args.per_device_train_batch_size):
            batches = batches_by_length([lengths[row] for row in rows], len(rows), self.max_tokens)
            pieces += [rows[batch].tolist() for batch in batches]
        return pieces

    def _forward(
        self, function: Any, episodes: dict[str, Tensor], batches: list[list[int]], module: Any = None
    ) -> list[Tensor]:
        """Run `function` in eval mode and in the training precision. module: the weights it uses, if not the model's."""
        self.model.eval()
        with cached_casts(module or self.model), self.accelerator.autocast(), without_cudnn_attention():
            return in_batches(function, episodes, batches, self.width_multiple)

    def metrics(self, rollout: Rollout, scores: Mapping[str, Scores], reduce: Reduce) -> dict[str, float]:
        """Return the means over the episodes of all processes."""
        means, device = MaskedMeans(), rollout.scores.device
        rewards = {
            f"rewards/{name}": torch.tensor(answer_scores(values), device=device) for name, values in scores.items()
        }
        means.add(rollout.episode_metrics(self.kl_coef.value) | rewards, torch.ones_like(rollout.stopped))
        return means.means(reduce) | {"objective/kl_coef": self.kl_coef.value}

    def state(self) -> dict[str, Any]:
        return {
            "kl_coef": self.kl_coef.value,
            "scale": self.scale.state(),
            "value_prior": self.value_prior.sums.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kl_coef.value = state["kl_coef"]
        self.scale.restore(state["scale"])
        self.value_prior.sums = torch.tensor(state["value_prior"], dtype=torch.float64)


def sum_rewards(
    scores: Mapping[str, Scores], weights: Sequence[float] | None, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted sum of all rewards: of whole answers (batch,), and of tokens (batch, tokens) or None."""
    totals = torch.zeros(len(mask), dtype=torch.float64)
    token_totals = torch.zeros(mask.shape, dtype=torch.float64)
    has_token_rewards = False
    for weight, values in zip(weights or [1.0] * len(scores), scores.values(), strict=True):
        for row, value in enumerate(values):
            if isinstance(value, list):
                has_token_rewards = True
                token_totals[row, : len(value)] += weight * torch.tensor(value, dtype=torch.float64)
            else:
                totals[row] += weight * value
    totals, token_totals = (sums.float().to(mask.device) for sums in (totals, token_totals))
    return totals, token_totals if has_token_rewards else None


def answer_scores(values: Scores) -> list[float]:
    """Return one number an answer: its score, or the sum of its token rewards."""
    return [sum(value) if isinstance(value, list) else value for value in values]
