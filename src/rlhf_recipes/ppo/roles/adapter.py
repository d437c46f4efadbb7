"""The adapter of a policy: a new one, the one it came with, or none."""

from dataclasses import replace
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.models import attach_adapter, has_adapter, is_quantized, prepare_for_lora_
from rlhf_recipes.ppo.config import PPOConfig

BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of LoraConfig.init_lora_weights


def build_trainable_policy(model: Any, peft_config: Any, args: PPOConfig) -> Any:
    """Return the policy as it is trained: with a new adapter, with the adapter it came with, or as it is."""
    if peft_config is not None:
        if has_adapter(model):
            raise UserError(
                "the policy has an adapter already; leave peft_config out to train that one, or merge it into its base "
                "and save that first (merge_and_unload)"
            )
        base = prepare_for_lora_(model, args.gradient_checkpointing)
        config = _check_init(_for_trained_layers(peft_config, model, args))
        return _check_adapter(attach_adapter(base, config))
    if is_quantized(base_model(model)) and not has_adapter(model):
        raise UserError(
            "a policy quantized to 4 or 8 bits cannot be trained itself; pass peft_config to train an adapter on it"
        )
    if args.model_adapter_name is not None and has_adapter(model):
        model.set_adapter(require_adapter(model, args.model_adapter_name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "no weight of the policy is trainable; load its adapter with is_trainable=True, or unfreeze it"
        )
    return _check_adapter(model) if has_adapter(model) else model


def _for_trained_layers(peft_config: Any, model: Any, args: PPOConfig) -> Any:
    """Return the adapter's config, limited to the layers of `num_layers_unfrozen` where it names no layers itself."""
    if args.num_layers_unfrozen is None or getattr(peft_config, "layers_to_transform", None) is not None:
        return peft_config
    layers = base_model(model).config.get_text_config().num_hidden_layers
    return replace(peft_config, layers_to_transform=list(range(layers - args.num_layers_unfrozen, layers)))


def _check_init(peft_config: Any) -> Any:
    """Refuse a way to initialise LoRA that changes the base, since reference and value use the base too."""
    init = getattr(peft_config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"init_lora_weights={init!r} changes the base, which is the reference and has the value's adapter; use True, "
            "'gaussian' or 'orthogonal'"
        )
    return peft_config


def _check_adapter(model: Any) -> Any:
    """Refuse an adapter that changes more than its own weights."""
    config = model.peft_config[model.active_adapter]
    if config.is_prompt_learning:
        raise UserError("prompt-learning adapters shift every position; use LoRA or another adapter of weights")
    if getattr(config, "bias", "none") != "none":
        raise UserError(
            f"an adapter with bias={config.bias!r} trains biases of the base, which other models share; use bias='none'"
        )
    return model


def require_adapter(model: Any, name: str) -> str:
    """Return the name if the policy has an adapter of this name, else raise a `UserError`."""
    if name not in model.peft_config:
        raise UserError(f"the policy has no adapter {name}; it has {', '.join(model.peft_config)}")
    return name
