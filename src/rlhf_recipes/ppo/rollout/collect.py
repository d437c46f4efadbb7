"""From answered and scored prompts to a rollout: what policy, value and reference say of every generated token."""

from collections.abc import Mapping, Sequence
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
from rlhf_recipes.ppo.roles.value import PolicyAndValue, ValueHead, policy_outputs
from rlhf_recipes.ppo.rollout.rewards import KLCoefficient, ScoreScale
from rlhf_recipes.ppo.rollout.rollout import RewardShape, Rollout, finish_rollout, in_batches, pack_episodes
from rlhf_recipes.ppo.rollout.value_prior import ValuePrior
from rlhf_recipes.scoring import Scores
from rlhf_recipes.system import tokens_per_forward, unsharded_weights


class RolloutCollector:
    """Makes rollouts, and owns what of them may move: the KL coefficient, the scores' scale and the value's prior."""

    def __init__(
        self,
        model: PolicyAndValue,
        reference: Reference,
        accelerator: Any,
        args: PPOConfig,
        rewards: Sequence[Any] = (),
    ) -> None:
        self.model, self.reference, self.accelerator, self.args = model, reference, accelerator, args
        # In bfloat16 rows of another width may round otherwise, but for whole tiles; these must fit the context.
        low = args.bf16 or next(model.policy.parameters()).dtype == torch.bfloat16
        fits = (context_length(base_model(model.policy).config) or TILE) % TILE == 0
        self.multiple, self.at_once = TILE if low and fits else 1, tokens_per_forward(args.device, low)
        self.kl_coef = KLCoefficient(args.kl_coef, args.adaptive_kl_target, args.adaptive_kl_horizon)
        held = args.reward_clip_range
        self.scale = ScoreScale(
            args.use_score_scaling, args.use_score_norm, None if held is None else (held[0], held[1])
        )
        starts = args.value_prior and isinstance(model.value_model, ValueHead)
        self.prior = ValuePrior(rewards, args.reward_weights, on=starts)

    def rollout(
        self,
        queries: Sequence[Sequence[int]],
        completions: Completions,
        scores: Mapping[str, Scores],
        weights: Sequence[float] | None,
        reduce: Reduce,
        learn: bool = True,
    ) -> Rollout:
        """This process's episodes of an update. scores: by each reward, added up by `weights` (1 each if None).

        learn: let the scores of all processes move the running scale.
        """
        device = self.args.device
        episodes = {name: tensor.to(device) for name, tensor in pack_episodes(queries, completions.ids).items()}
        mask = episodes["response_mask"]
        with unsharded_weights(self.model, self.accelerator):
            log_probs, reference_log_probs, values = self._read_by_each(episodes)
        totals, token_totals = sum_rewards(scores, weights, mask)
        totals = self.scale(totals, reduce, learn)
        readings = self.prior.readings(mask) if learn else None
        self.prior.forget()  # the next episodes may be the caller's own
        if readings is not None:
            earned = totals if token_totals is None else totals + token_totals.sum(1)
            self.prior.learn(readings, earned, mask, reduce)
            episodes["prior"] = torch.where(mask, self.prior(readings), torch.zeros_like(values))
            values = values + episodes["prior"]
        return finish_rollout(
            episodes,
            torch.tensor(completions.stopped, device=device),
            totals,
            log_probs,
            reference_log_probs,
            values,
            RewardShape.of(self.args, kl_coef=self.kl_coef.value),
            reduce,
            token_totals,
        )

    def _read_by_each(self, episodes: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities by the policy and by the reference, and values; `episodes` gains the lower layers' states."""
        batches, temperature = self._batches(episodes["attention_mask"]), self.args.temperature
        if self.model.lower is not None:
            (episodes["lower_states"],) = self._read(self.model.read_lower, episodes, batches)
        log_probs, _, values = self._read(partial(self.model, temperature=temperature), episodes, batches)
        with self.reference.asked() as module:
            reads = partial(policy_outputs, module, temperature=temperature)
            (reference,) = self._read(lambda **columns: reads(**columns)[1:2], episodes, batches, module)
        return log_probs, reference, values

    def _batches(self, attention_mask: Tensor) -> list[list[int]]:
        """Rows of like length. Where a minibatch is all there is, these are the very pieces that it is trained in: in
        bfloat16 another shape may round otherwise, and the probability ratio would start a little off 1.
        """
        args, lengths = self.args, attention_mask.sum(1).tolist()
        if args.num_mini_batches > 1 or args.device.type != "cpu":
            return batches_by_length(lengths, args.local_rollout_forward_batch_size, self.at_once)
        pieces = []
        order = torch.tensor(lengths).argsort(stable=True)
        for rows in order.split(args.per_device_train_batch_size):
            inner = batches_by_length([lengths[row] for row in rows], len(rows), self.at_once)
            pieces += [rows[batch].tolist() for batch in inner]
        return pieces

    def _read(
        self, ask: Any, episodes: dict[str, Tensor], batches: list[list[int]], module: Any = None
    ) -> list[Tensor]:
        """In eval mode and in the precision that trains. module: whose weights `ask` uses, if not the model's."""
        self.model.eval()
        with cached_casts(module or self.model), self.accelerator.autocast(), without_cudnn_attention():
            return in_batches(ask, episodes, batches, self.multiple)

    def metrics(self, rollout: Rollout, scores: Mapping[str, Scores], reduce: Reduce) -> dict[str, float]:
        """Means over the episodes of all processes."""
        tally, device = MaskedMeans(), rollout.scores.device
        rewards = {
            f"rewards/{name}": torch.tensor(answer_scores(each), device=device) for name, each in scores.items()
        }
        tally.add(rollout.episode_metrics(self.kl_coef.value) | rewards, torch.ones_like(rollout.stopped))
        return tally.means(reduce) | {"objective/kl_coef": self.kl_coef.value}

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef.value, "scale": self.scale.state(), "prior": self.prior.sums.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kl_coef.value = state["kl_coef"]
        self.scale.restore(state["scale"])
        self.prior.sums = torch.tensor(state["prior"], dtype=torch.float64)


def sum_rewards(
    scores: Mapping[str, Scores], weights: Sequence[float] | None, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The weighted sum of all rewards: of whole answers (batch,), and of single tokens (batch, tokens) if there are any."""
    totals = torch.zeros(len(mask), dtype=torch.float64)
    token_totals = torch.zeros(mask.shape, dtype=torch.float64)
    single = False
    for weight, values in zip(weights or [1.0] * len(scores), scores.values(), strict=True):
        for row, value in enumerate(values):
            if isinstance(value, list):
                single = True
                token_totals[row, : len(value)] += weight * torch.tensor(value, dtype=torch.float64)
            else:
                totals[row] += weight * value
    totals, token_totals = (sums.float().to(mask.device) for sums in (totals, token_totals))
    return totals, token_totals if single else None


def answer_scores(values: Scores) -> list[float]:
    """One number an answer: its score, or the sum of its tokens'."""
    return [sum(value) if isinstance(value, list) else value for value in values]
