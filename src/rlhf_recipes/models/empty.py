"""A model without weights, made of its configuration, to ask it what only its modules tell."""

import copy
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def build_empty_model(config: "PretrainedConfig", task: str = "CAUSAL_LM", trust_remote_code: bool = False) -> Any:
    """Return the model on the meta device. task: CAUSAL_LM or SEQ_CLS.

    Raises:
        UserError: transformers has no model of this kind for the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_class: Any = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto_class.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except (ValueError, ImportError, OSError) as error:
        kind = "sequence classifier" if task == "SEQ_CLS" else "language model"
        reason = str(error).strip().splitlines()[0].split(" for this kind of")[0]
        raise UserError(f"transformers has no {kind} for a {config.model_type}: {reason}; use another model") from None


def refuse_encoder(
    config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase", name: str, trust_remote_code: bool = False
) -> None:
    """Refuse a model whose classifier reads a row at its first token, as encoders do. No weights are loaded.

    Raises:
        UserError: names the model; or transformers has no classifier of this architecture.
    """
    model = build_empty_model(config, "SEQ_CLS", trust_remote_code)
    if "score" not in dict(model.named_children()) and getattr(tokenizer, "cls_token_id", None) is not None:
        raise UserError(
            f"model {name} would be a {type(model).__name__}, which reads a row at its first token; start from a causal "
            "language model, whose classifier reads it at its last"
        )
