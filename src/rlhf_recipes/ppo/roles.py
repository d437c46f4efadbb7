"""Who plays in PPO: the policy, its reference, the rewards; each checked before it is needed."""

import copy
from typing import Any

from torch import nn

from rlhf_recipes.arguments import UserError
from rlhf_recipes.generation import stop_ids
from rlhf_recipes.models import load_causal_lm, load_tokenizer
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.prompts import Prompts
from rlhf_recipes.ppo.value_head import base_model
from rlhf_recipes.scoring import ModelReward, Reward, load_reward


def loaded_policy(model: nn.Module | str, tokenizer: Any, quantization: Any) -> tuple[nn.Module, Any]:
    """The policy and its tokenizer, read from the folder or Hub id where a name is given."""
    if not isinstance(model, str):
        return model, tokenizer
    tokenizer = tokenizer or load_tokenizer(model)
    return load_causal_lm(model, **({"quantization_config": quantization} if quantization else {})), tokenizer


def checked_prompts(
    config: Any, tokenizer: Any, train_dataset: Any, eval_dataset: Any, args: PPOConfig
) -> tuple[Prompts, Prompts | None]:
    """The training and the held-out prompts, if the policy (its config and tokenizer) can answer every one of them."""
    if tokenizer is None:
        raise UserError("PPOTrainer needs the policy's tokenizer; pass processing_class")
    if tokenizer.eos_token_id is None:
        raise UserError("the policy's tokenizer has no EOS token, so no answer could end; set tokenizer.eos_token")
    train = Prompts(train_dataset, tokenizer, config, args.response_length, "train_dataset")
    if len(train) < args.episodes_per_update:
        raise UserError(
            f"train_dataset has {len(train)} prompts, fewer than the {args.episodes_per_update} episodes of one "
            "update (per_device_train_batch_size x gradient_accumulation_steps x processes); lower the batch"
        )
    if eval_dataset is None:
        return train, None
    return train, Prompts(eval_dataset, tokenizer, config, args.response_length, "eval_dataset")


def with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    if peft_config is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, peft_config)


def frozen_reference(model: nn.Module, ref_model: nn.Module | None, peft_config: Any) -> nn.Module | None:
    """The frozen reference; None where the policy without its adapter is the reference."""
    if ref_model is model:
        raise UserError(
            "ref_model is the policy itself, and would move with it; pass a copy, or None to have one made"
        )
    if ref_model is None and (peft_config is not None or "disable_adapter" in dir(model)):
        return None
    reference = copy.deepcopy(model) if ref_model is None else ref_model
    return reference.requires_grad_(False).eval()


def load_rewards(sources: Any, tokenizer: Any, tokenizers: Any, args: PPOConfig) -> list[Reward]:
    if sources is None:
        raise UserError(
            "PPOTrainer needs something that scores answers; pass reward_funcs (a model, a path or a function)"
        )
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    own = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(sources)
    if len(own) != len(sources) or (args.reward_weights is not None and len(args.reward_weights) != len(sources)):
        raise UserError(
            f"there are {len(sources)} rewards; reward_weights and reward_processing_classes need one entry each"
        )
    batch = args.local_rollout_forward_batch_size
    rewards = [
        load_reward(source, tokenizer, tokenizer=each, device=args.device, batch_size=batch)
        for source, each in zip(sources, own, strict=True)
    ]
    for reward in rewards:
        if args.normalize_rewards and isinstance(reward, ModelReward):
            reward.normalize()
    for index, reward in enumerate(rewards):
        if reward.name in [other.name for other in rewards[:index]]:
            reward.name = f"{reward.name}_{index}"
    return rewards


def chosen_stop_ids(model: nn.Module, tokenizer: Any, args: PPOConfig) -> tuple[int, ...]:
    if args.stop_token_id is not None:
        return (args.stop_token_id,)
    return (int(tokenizer.eos_token_id),) if args.stop_token == "eos" else stop_ids(base_model(model), tokenizer)


def without_dropout(module: nn.Module | None) -> None:
    """With dropout the update's probabilities would not be the rollout's, and the ratio would start off 1."""
    for part in module.modules() if module is not None else ():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
