"""Checks of the models and prompts that PPO is given, before anything is trained."""

import math
from typing import Any

from torch import nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.data import Prompts
from rlhf_recipes.models import check_stop_id, check_token_ids, context_length, token_count, vocabulary_size
from rlhf_recipes.optimizations import check_layer_count
from rlhf_recipes.ppo.config import PPOConfig


def check_prompts(
    config: Any, tokenizer: Any, train_dataset: Any, eval_dataset: Any, args: PPOConfig, required: bool = True
) -> tuple[Prompts | None, Any]:
    """Return the training and the held-out prompts, once the policy is known to be able to answer every one of them.

    config, tokenizer: the policy's. required: there must be training prompts.
    """
    if tokenizer is None:
        raise UserError("PPOTrainer needs the policy's tokenizer; pass processing_class")
    if args.num_layers_unfrozen is not None:
        check_layer_count(args.num_layers_unfrozen, config.get_text_config().num_hidden_layers)
    if tokenizer.eos_token_id is None:
        raise UserError("the policy's tokenizer has no EOS token, so no answer could end; set tokenizer.eos_token")
    size = min(token_count(tokenizer), vocabulary_size(config) or math.inf)
    check_stop_id(args.stop_token_id, int(size))
    train = None
    if train_dataset is not None or required:
        train = _read_prompts(config, tokenizer, train_dataset, args, "train_dataset")
        if len(train) < args.episodes_per_update:
            raise UserError(
                f"train_dataset has {len(train)} prompts, fewer than the {args.episodes_per_update} episodes of one "
                "update (per_device_train_batch_size x gradient_accumulation_steps x processes); lower the batch"
            )
        check_token_ids(train.ids, vocabulary_size(config), "train_dataset row")
    return train, None if eval_dataset is None else evaluation_prompts(config, tokenizer, eval_dataset, args)


def evaluation_prompts(config: Any, tokenizer: Any, dataset: Any, args: PPOConfig) -> Any:
    """Return `Prompts`, or a dict of them for a dict of datasets."""
    if isinstance(dataset, dict):
        return {name: evaluation_prompts(config, tokenizer, each, args) for name, each in dataset.items()}
    return _read_prompts(config, tokenizer, dataset, args, "eval_dataset")


def _read_prompts(config: Any, tokenizer: Any, dataset: Any, args: PPOConfig, role: str) -> Prompts:
    prompts = dataset
    if not isinstance(dataset, Prompts):
        prompts = Prompts(dataset, tokenizer, context_length(config), args.response_length, role)
    check_token_ids(prompts.ids, vocabulary_size(config), f"{role} row")
    return prompts


def refuse_sharded(role: str, model: Any) -> None:
    """Refuse a model that ZeRO-3 sharded while it was loaded.

    Raises:
        UserError: names the role of the model.
    """
    if isinstance(model, nn.Module) and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UserError(
            f"the {role} was sharded as it was loaded under ZeRO-3, and generation needs full weights; pass its folder or "
            "Hub id, or load it before you create the PPOConfig"
        )


def check_vocabulary(role: str, model: Any, policy: Any) -> None:
    """Refuse a model object whose vocabulary is not the policy's, where the model has no tokenizer."""
    configs = [getattr(each, "config", None) for each in (model, base_model(policy))]
    sizes = [None if config is None else vocabulary_size(config) for config in configs]
    if isinstance(model, nn.Module) and None not in sizes and sizes[0] != sizes[1]:
        raise UserError(
            f"the {role} has {sizes[0]} token embeddings and the policy {sizes[1]}, so it reads other ids; "
            + (
                "pass its tokenizer as reward_processing_classes (or the policy's, if the ids are the same)"
                if role == "reward model"
                else "pass one with the policy's vocabulary"
            )
        )
