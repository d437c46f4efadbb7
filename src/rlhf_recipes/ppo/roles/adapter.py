"""The adapter by which a policy learns: a new one, the one it came with, or none."""

from dataclasses import replace
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.models import has_adapter, is_quantized, prepare_for_lora
from rlhf_recipes.ppo.config import PPOConfig

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin LoRA, see peft's LoraConfig


def build_trainable_policy(model: Any, peft_config: Any, args: PPOConfig) -> Any:
    """The policy as it is trained: with a new adapter on it, with the one it arrived with, or as it is."""
    if peft_config is not None:
        from peft import get_peft_model

        if has_adapter(model):
            raise UserError(
                "the policy has an adapter already; leave peft_config out to train that one, or merge it into its base "
                "and save that first (merge_and_unload)"
            )
        base, fitted = prepare_for_lora(model, args.gradient_checkpointing), within(peft_config, model, args)
        return _beside_its_base(get_peft_model(base, _leaving_the_base(fitted)))
    if is_quantized(base_model(model)) and not has_adapter(model):
        raise UserError("a policy in 4 or 8 bits cannot be trained itself; pass peft_config to train an adapter on it")
    if args.model_adapter_name is not None and has_adapter(model):
        model.set_adapter(require_adapter(model, args.model_adapter_name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the policy has nothing that trains; read its adapter with is_trainable=True, or unfreeze it")
    return _beside_its_base(model) if has_adapter(model) else model


def within(peft_config: Any, model: Any, args: PPOConfig) -> Any:
    """The adapter's config, for no other layers than those that learn, where it does not say for which."""
    if args.num_layers_unfrozen is None or getattr(peft_config, "layers_to_transform", None) is not None:
        return peft_config
    layers = base_model(model).config.get_text_config().num_hidden_layers
    return replace(peft_config, layers_to_transform=list(range(layers - args.num_layers_unfrozen, layers)))


def _leaving_the_base(peft_config: Any) -> Any:
    """A config of a new adapter that begins without changing the base, which is the reference's and the value's as well."""
    begins = getattr(peft_config, "init_lora_weights", True)
    if isinstance(begins, str) and begins.lower().startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"init_lora_weights={begins!r} changes the base, which is the reference and carries the value's adapter; take "
            "True, 'gaussian' or 'orthogonal'"
        )
    return peft_config


def _beside_its_base(model: Any) -> Any:
    config = model.peft_config[model.active_adapter]
    if config.is_prompt_learning:
        raise UserError(
            "an adapter that learns a prompt moves every position; take LoRA or another adapter of weights"
        )
    if getattr(config, "bias", "none") != "none":
        raise UserError(
            f"an adapter with bias={config.bias!r} trains biases of the base, on which other roles stand too; take bias='none'"
        )
    return model


def require_adapter(model: Any, name: str) -> str:
    if name not in model.peft_config:
        raise UserError(f"the policy has no adapter {name}; it has {', '.join(model.peft_config)}")
    return name
