"""The models of PPO, built and checked: policy, value and reference, and how answers are sampled."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.generation import Sampling, stop_ids
from rlhf_recipes.models import (
    REFERENCE_ADAPTER,
    VALUE_ADAPTER,
    adapter_parameters,
    copy_adapter,
    disable_adapters,
    disable_dropout_,
    has_adapter,
    is_quantized,
    load_causal_lm,
    load_tokenizer,
    token_count,
    use_adapter,
)
from rlhf_recipes.optimizations import UpperLayers, fuse_kernels_
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.roles.adapter import require_adapter
from rlhf_recipes.ppo.roles.checks import check_vocabulary, refuse_sharded
from rlhf_recipes.ppo.roles.outputs import check_head
from rlhf_recipes.ppo.roles.value import PolicyAndValue, ValueHead
from rlhf_recipes.system import cast_like_engine_, load_unsharded, refuse_sharded_8bit


@load_unsharded()
def load_policy(
    model: nn.Module | str, tokenizer: Any, quantization: Any, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Return the policy and its tokenizer; loads them where a folder or Hub id is given."""
    refuse_sharded("policy", model)
    if not isinstance(model, str):
        if quantization is not None:
            raise UserError("quantization_config is for a policy given by its name; load yours with it instead")
        return model, tokenizer
    if getattr(quantization, "load_in_8bit", False):
        refuse_sharded_8bit()
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    options = code if quantization is None else code | {"quantization_config": quantization}
    return load_causal_lm(model, **options), tokenizer or load_tokenizer(model, **code)


def build_policy_and_value(
    policy: Any, value_model: nn.Module | None, args: PPOConfig, vocabulary: int | None = None
) -> PolicyAndValue:
    """Put policy and value into one module. Where the policy has an adapter, the value may get its own on the same base.

    vocabulary: ids from here on are no tokens; see `PolicyAndValue`.
    """
    refuse_sharded("value_model", value_model)
    check_vocabulary("value_model", value_model, policy)
    if value_model is not None and is_quantized(base_model(value_model)) and not has_adapter(value_model):
        raise UserError(
            "a value model quantized to 4 or 8 bits cannot be trained itself; put an adapter on it (get_peft_model)"
        )
    check_head(policy)
    own_adapter = args.value_adapter and value_model is None and has_adapter(policy)
    if own_adapter and args.gradient_checkpointing:
        raise UserError(
            "gradient_checkpointing recomputes states when another adapter may be active, so the value cannot have its own "
            "adapter; set value_adapter to false"
        )
    adapter = copy_adapter(policy, VALUE_ADAPTER, trainable=True) if own_adapter else None
    model = PolicyAndValue(policy, value_model, adapter, args.num_layers_unfrozen, vocabulary)
    if not isinstance(model.value_model, ValueHead):
        fuse_kernels_(model.value_model, args.device)
    return model


class Reference:
    """The reference model of the KL penalty.

    module: what gives log-probabilities. policy: where the module is the policy itself, the model whose adapters are switched:
    to `adapter`, or off.
    """

    def __init__(self, module: Any, policy: Any = None, adapter: str | None = None) -> None:
        self.module, self.policy, self.adapter = module, policy, adapter

    @contextmanager
    def active(self) -> Iterator[nn.Module]:
        """Within this block, the module that is yielded gives the reference's log-probabilities."""
        if self.policy is None:
            yield self.module
            return
        with disable_adapters(self.policy) if self.adapter is None else use_adapter(self.policy, self.adapter):
            yield self.module


def build_reference(model: PolicyAndValue, came_with_adapter: bool, ref_model: Any, args: PPOConfig) -> Reference:
    """Build the reference of a policy before anything is trained.

    Without `ref_model` it is the policy as it is now: a copy (of the trained layers), its base where the adapter is new, or
    a frozen copy of the adapter that the policy came with.
    """
    policy = model.policy
    if ref_model is policy:
        raise UserError("ref_model is the policy itself, which is trained; pass a copy, or None to have one made")
    refuse_sharded("ref_model", ref_model)
    check_vocabulary("ref_model", ref_model, policy)
    if ref_model is not None:
        return Reference(_freeze_(fuse_kernels_(ref_model, args.device), args))
    if not has_adapter(policy):
        if isinstance(model.upper, UpperLayers):
            return Reference(_freeze_(model.upper.frozen_copy(), args))
        return Reference(_freeze_(copy.deepcopy(policy), args))
    if args.ref_adapter_name is not None:
        name = require_adapter(policy, args.ref_adapter_name)
        if name == policy.active_adapter:
            raise UserError(
                f"ref_adapter_name is {name}, the adapter that is trained; leave it out, and the reference is a frozen copy "
                "of that adapter"
            )
        for parameter in adapter_parameters(policy, name):
            parameter.requires_grad_(False)
        return Reference(model.upper, policy, name)
    adapter = copy_adapter(policy, REFERENCE_ADAPTER, trainable=False) if came_with_adapter else None
    return Reference(model.upper, policy, adapter)


def _freeze_(module: nn.Module, args: PPOConfig) -> nn.Module:
    disable_dropout_(module)
    cast_like_engine_(module, args)  # like the policy, or the two would differ before any training
    return module.requires_grad_(False).eval().to(args.device)


def build_sampling(model: nn.Module, tokenizer: Any, args: PPOConfig) -> Sampling:
    """Return how answers are sampled, and the ids at which they stop."""
    stops = (int(tokenizer.eos_token_id),) if args.stop_token == "eos" else stop_ids(base_model(model), tokenizer)
    if args.stop_token_id is not None:
        stops = (args.stop_token_id,)
    options: Any = args.generation_kwargs or {}
    vocabulary = token_count(tokenizer)
    return Sampling(args.response_length, args.temperature, stop_ids=stops, vocabulary=vocabulary, **options)
