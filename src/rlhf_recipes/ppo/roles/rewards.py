"""The rewards of PPO, loaded and checked."""

from collections.abc import Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.models import load_tokenizer
from rlhf_recipes.optimizations import fuse_kernels_
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.roles.checks import check_vocabulary, refuse_sharded
from rlhf_recipes.ppo.roles.shared_base import SharedBaseRewardModel, shares_base
from rlhf_recipes.ppo.roles.value import PolicyAndValue, ValueHead
from rlhf_recipes.scoring import ModelReward, Reward, load_reward
from rlhf_recipes.system import load_unsharded


@load_unsharded()
def load_rewards(
    model: PolicyAndValue,
    sources: Any,
    tokenizer: Any,
    tokenizers: Any,
    args: PPOConfig,
    required: bool = True,
    quantization_config: Any = None,
) -> list[Reward]:
    """Load the rewards, each under its own name. A reward model that is an adapter on the policy's base uses that base.

    Args:
        sources: one reward or a list of them, as `PPOTrainer` takes them.
        tokenizer: the policy's. tokenizers: the reward models', or None where they are the policy's.
        required: raise where `sources` is None.
        quantization_config: for reward models given by name that do not share the policy's base.
    """
    if sources is None:
        if required:
            raise UserError("PPOTrainer needs a reward; pass reward_funcs (a model, a path or a function)")
        return []
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    tokenizers = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(sources)
    weights = args.reward_weights
    if len(tokenizers) != len(sources) or (weights is not None and len(weights) != len(sources)):
        raise UserError(
            f"there are {len(sources)} rewards; reward_weights and reward_processing_classes need one entry each"
        )
    for source, own_tokenizer in zip(sources, tokenizers, strict=True):
        refuse_sharded("reward model", source)
        if own_tokenizer is None:
            check_vocabulary("reward model", source, model.policy)
    uses_prefix_scores = args.value_prior and isinstance(model.value_model, ValueHead)
    rewards: list[Reward] = []
    for index, (source, own_tokenizer) in enumerate(zip(sources, tokenizers, strict=True)):
        if isinstance(source, str) and shares_base(source, model.policy):
            own_tokenizer = own_tokenizer or load_tokenizer(source)
            source = SharedBaseRewardModel(model.policy, source, f"ppo_reward_model_{index}")
        reward = load_reward(
            source,
            tokenizer,
            tokenizer=own_tokenizer,
            device=args.device,
            batch_size=args.local_rollout_forward_batch_size,
            quantization_config=quantization_config,
            prefix_scores=uses_prefix_scores and (weights is None or weights[index] != 0),
        )
        if isinstance(reward, ModelReward):
            fuse_kernels_(reward.model, args.device)
            if args.normalize_rewards:
                reward.normalize()
        if reward.name in [other.name for other in rewards]:
            reward.name = f"{reward.name}_{index}"
        rewards.append(reward)
    return rewards


def unweighted_reward_names(rewards: Sequence[Reward], weights: Sequence[float] | None) -> list[str]:
    """Return the names of the rewards of weight 0, which are logged and not trained on."""
    return [
        reward.name for reward, weight in zip(rewards, weights or [1.0] * len(rewards), strict=True) if weight == 0
    ]
