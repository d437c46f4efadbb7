"""Who plays in PPO: the policy, its reference, the rewards; each checked before it is needed."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.data import Prompts
from rlhf_recipes.generation import Sampling, stop_ids
from rlhf_recipes.models import (
    REFERENCE_ADAPTER,
    VALUE_ADAPTER,
    adapter_parameters,
    context_length,
    copy_adapter,
    disable_adapters,
    has_adapter,
    is_quantized,
    load_causal_lm,
    load_tokenizer,
    use_adapter,
)
from rlhf_recipes.optimizations import UpperLayers, check_layer_count, fuse_kernels_
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.roles.adapter import require_adapter
from rlhf_recipes.ppo.roles.shared_base import SharedBaseRewardModel, shares_base
from rlhf_recipes.ppo.roles.value import PolicyAndValue, ValueHead, check_head
from rlhf_recipes.scoring import ModelReward, Reward, load_reward
from rlhf_recipes.system import cast_like_engine_, load_unsharded, refuse_sharded_8bit


@load_unsharded()
def load_policy(
    model: nn.Module | str, tokenizer: Any, quantization: Any, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """The policy and its tokenizer, read from the folder or Hub id where a name is given."""
    refuse_sharded("policy", model)
    if not isinstance(model, str):
        if quantization is not None:
            raise UserError("quantization_config is for a policy given by its name; load yours with it instead")
        return model, tokenizer
    if getattr(quantization, "load_in_8bit", False):
        refuse_sharded_8bit()
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    reads = code if quantization is None else code | {"quantization_config": quantization}
    return load_causal_lm(model, **reads), tokenizer or load_tokenizer(model, **code)


def check_prompts(
    config: Any, tokenizer: Any, train_dataset: Any, eval_dataset: Any, args: PPOConfig, needed: bool = True
) -> tuple[Prompts | None, Any]:
    """The training and the held-out prompts, if the policy (its config and tokenizer) can answer every one of them.

    needed: whether there must be training prompts.
    """
    if tokenizer is None:
        raise UserError("PPOTrainer needs the policy's tokenizer; pass processing_class")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None):
            raise UserError(
                f"the policy bends its logits ({name}), which PPOTrainer would leave out; take another model"
            )
    if args.num_layers_unfrozen is not None:
        check_layer_count(args.num_layers_unfrozen, config.get_text_config().num_hidden_layers)
    if tokenizer.eos_token_id is None:
        raise UserError("the policy's tokenizer has no EOS token, so no answer could end; set tokenizer.eos_token")
    train = None
    if train_dataset is not None or needed:
        train = Prompts(train_dataset, tokenizer, context_length(config), args.response_length, "train_dataset")
        if len(train) < args.episodes_per_update:
            raise UserError(
                f"train_dataset has {len(train)} prompts, fewer than the {args.episodes_per_update} episodes of one "
                "update (per_device_train_batch_size x gradient_accumulation_steps x processes); lower the batch"
            )
    return train, None if eval_dataset is None else evaluation_prompts(config, tokenizer, eval_dataset, args)


def evaluation_prompts(config: Any, tokenizer: Any, dataset: Any, args: PPOConfig) -> Any:
    """`Prompts`, or a dict of them for a dict of datasets."""
    if isinstance(dataset, dict):
        return {name: evaluation_prompts(config, tokenizer, each, args) for name, each in dataset.items()}
    return Prompts(dataset, tokenizer, context_length(config), args.response_length, "eval_dataset")


def refuse_sharded(role: str, model: Any) -> None:
    """Raises UserError, if a model was cut apart as it was loaded."""
    if isinstance(model, nn.Module) and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            f"the {role} was cut apart as it was loaded under ZeRO-3, and answers come from whole weights; give its "
            "folder or Hub id, or load it before the PPOConfig is made"
        )


def build_policy_and_value(policy: Any, value_model: nn.Module | None, args: PPOConfig) -> PolicyAndValue:
    """Policy and value in one module; where the policy has an adapter, the value may have one on the same base."""
    refuse_sharded("value_model", value_model)
    _check_vocabulary("value_model", value_model, policy)
    if value_model is not None and is_quantized(base_model(value_model)) and not has_adapter(value_model):
        raise UserError("a value model in 4 or 8 bits cannot be trained itself; put an adapter on it (get_peft_model)")
    check_head(policy)
    own = args.value_adapter and value_model is None and has_adapter(policy)
    if own and args.gradient_checkpointing:
        raise UserError(
            "gradient_checkpointing computes states again when another adapter may be on, so the value cannot have an "
            "adapter of its own; set value_adapter to false"
        )
    adapter = copy_adapter(policy, VALUE_ADAPTER, trainable=True) if own else None
    both = PolicyAndValue(policy, value_model, adapter, args.num_layers_unfrozen)
    if not isinstance(both.value_model, ValueHead):
        fuse_kernels_(both.value_model, args.device)
    return both


class Reference:
    """What the KL penalty holds the policy near.

    reader: what answers. policy: whose adapters are switched for the time, where the reader is the policy itself: to
    `adapter`, or off.
    """

    def __init__(self, reader: Any, policy: Any = None, adapter: str | None = None) -> None:
        self.module, self.policy, self.adapter = reader, policy, adapter

    @contextmanager
    def asked(self) -> Iterator[nn.Module]:
        """The module that answers as the reference, for the time."""
        if self.policy is None:
            yield self.module
        else:
            with disable_adapters(self.policy) if self.adapter is None else use_adapter(self.policy, self.adapter):
                yield self.module


def build_reference(model: PolicyAndValue, arrived: bool, ref_model: Any, args: PPOConfig) -> Reference:
    """The reference of a policy, before anything trains. arrived: the policy came with the adapter that trains.

    Without `ref_model` it is the policy as it is now: a copy (of the layers that learn), its base where the adapter is
    new, or a frozen twin of the adapter that it arrived with.
    """
    policy = model.policy
    if ref_model is policy:
        raise UserError(
            "ref_model is the policy itself, and would move with it; pass a copy, or None to have one made"
        )
    refuse_sharded("ref_model", ref_model)
    _check_vocabulary("ref_model", ref_model, policy)
    if ref_model is not None:
        return Reference(_frozen(fuse_kernels_(ref_model, args.device), args))
    if not has_adapter(policy):
        if isinstance(model.upper, UpperLayers):
            return Reference(_frozen(model.upper.frozen_copy(), args))
        return Reference(_frozen(copy.deepcopy(policy), args))
    if args.ref_adapter_name is not None:
        name = require_adapter(policy, args.ref_adapter_name)
        if name == policy.active_adapter:
            raise UserError(
                f"ref_adapter_name is {name}, the adapter that is trained, and would move with it; leave it out, and the "
                "reference is that adapter as it is now"
            )
        for parameter in adapter_parameters(policy, name):
            parameter.requires_grad_(False)
        return Reference(model.upper, policy, name)
    twin = copy_adapter(policy, REFERENCE_ADAPTER, trainable=False) if arrived else None
    return Reference(model.upper, policy, twin)


def _frozen(module: nn.Module, args: PPOConfig) -> nn.Module:
    disable_dropout_(module)
    cast_like_engine_(module, args)  # as the policy, or they would differ before it has learnt anything
    return module.requires_grad_(False).eval().to(args.device)


@load_unsharded()
def load_rewards(
    policy: Any, sources: Any, tokenizer: Any, tokenizers: Any, args: PPOConfig, needed: bool = True, bits: Any = None
) -> list[Reward]:
    """What scores answers, each with a name of its own. A reward model that is an adapter on the policy's base rides on it.

    bits: the quantization_config that other reward models are read with, where they are given by name.
    """
    if sources is None and needed:
        raise UserError(
            "PPOTrainer needs something that scores answers; pass reward_funcs (a model, a path or a function)"
        )
    if sources is None:
        return []
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    own = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(sources)
    if len(own) != len(sources) or (args.reward_weights is not None and len(args.reward_weights) != len(sources)):
        raise UserError(
            f"there are {len(sources)} rewards; reward_weights and reward_processing_classes need one entry each"
        )
    batch = args.local_rollout_forward_batch_size
    for index, source in enumerate(sources):
        refuse_sharded("reward model", source)
        if own[index] is None:
            _check_vocabulary("reward model", source, policy)
        if isinstance(source, str) and shares_base(source, policy):
            sources[index], own[index] = (
                SharedBaseRewardModel(policy, source, f"ppo_reward_model_{index}"),
                own[index] or load_tokenizer(source),
            )
    rewards = [
        load_reward(source, tokenizer, tokenizer=each, device=args.device, batch_size=batch, quantization_config=bits)
        for source, each in zip(sources, own, strict=True)
    ]
    for reward in rewards:
        if isinstance(reward, ModelReward):
            fuse_kernels_(reward.model, args.device)
            if args.normalize_rewards:
                reward.normalize()
    for index, reward in enumerate(rewards):
        if reward.name in [other.name for other in rewards[:index]]:
            reward.name = f"{reward.name}_{index}"
    return rewards


def _check_vocabulary(role: str, model: Any, policy: Any) -> None:
    """Refuse a model object that cannot read the policy's ids, where nothing says what it reads instead."""
    sizes = [getattr(getattr(each, "config", None), "vocab_size", None) for each in (model, base_model(policy))]
    if isinstance(model, nn.Module) and None not in sizes and sizes[0] != sizes[1]:
        raise UserError(
            f"the {role} has {sizes[0]} token embeddings and the policy {sizes[1]}, so it reads other ids; "
            + (
                "pass its tokenizer as reward_processing_classes (or the policy's, if it reads those after all)"
                if role == "reward model"
                else "give one with the policy's vocabulary"
            )
        )


def unweighted_reward_names(rewards: Sequence[Reward], weights: Sequence[float] | None) -> list[str]:
    """Names of the rewards that are logged and not learnt from."""
    return [
        reward.name for reward, weight in zip(rewards, weights or [1.0] * len(rewards), strict=True) if weight == 0
    ]


def build_sampling(model: nn.Module, tokenizer: Any, args: PPOConfig) -> Sampling:
    """How answers are drawn, and at which tokens they stop."""
    stops = (int(tokenizer.eos_token_id),) if args.stop_token == "eos" else stop_ids(base_model(model), tokenizer)
    if args.stop_token_id is not None:
        stops = (args.stop_token_id,)
    given: Any = args.generation_kwargs or {}
    return Sampling(args.response_length, args.temperature, stop_ids=stops, **given)


def disable_dropout_(module: nn.Module | None) -> None:
    """With dropout the update's probabilities would not be the rollout's, and the ratio would start off 1."""
    for part in module.modules() if module is not None else ():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for name, value in list(
            vars(part).items()
        ):  # numbers that models keep: attention_dropout, attn_dropout, layerdrop
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
