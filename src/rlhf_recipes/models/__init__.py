"""Build, load, check and quantize models and tokenizers; adapters on one copy of the base weights."""

from rlhf_recipes.models.adapters import (
    ADAPTER_WEIGHTS,
    REFERENCE_ADAPTER,
    VALUE_ADAPTER,
    adapter_parameters,
    add_adapter_from,
    copy_adapter,
    disable_adapters,
    has_adapter,
    load_adapter_state,
    save_adapter,
    use_adapter,
)
from rlhf_recipes.models.architectures import (
    check_prompts_fit,
    check_stop_id,
    check_token_ids,
    context_length,
    hidden_size_of,
    refuse_left_padding,
    refuse_packing,
    text_config,
    token_count,
    vocabulary_size,
)
from rlhf_recipes.models.behavior import check_fused_head, check_left_padding, check_packing
from rlhf_recipes.models.dropout import disable_dropout_
from rlhf_recipes.models.empty import build_empty_model, refuse_encoder
from rlhf_recipes.models.gpt2 import SIZES, build_gpt2
from rlhf_recipes.models.loading import (
    is_reward_model,
    load_causal_lm,
    load_config,
    load_reward_model,
    load_tokenizer,
    reward_label_count,
    save_reward_model_config,
    saved_eos_ids,
)
from rlhf_recipes.models.logits import refuse_logits_unknown_to_trl, transform_logits
from rlhf_recipes.models.lora import attach_adapter, build_lora_config, prepare_for_lora_, trainable_to_float32_
from rlhf_recipes.models.padding import count_positions_from_mask_
from rlhf_recipes.models.quantization import (
    FrozenQuantizationArguments,
    LoadingArguments,
    is_quantized,
    quantization_kwargs,
    will_be_quantized,
)
from rlhf_recipes.models.sources import is_adapter
from rlhf_recipes.models.start import StartingModel, check_policy, check_quantization, check_starting_model

__all__ = [
    "ADAPTER_WEIGHTS",
    "REFERENCE_ADAPTER",
    "SIZES",
    "VALUE_ADAPTER",
    "FrozenQuantizationArguments",
    "LoadingArguments",
    "StartingModel",
    "adapter_parameters",
    "add_adapter_from",
    "attach_adapter",
    "build_empty_model",
    "build_gpt2",
    "build_lora_config",
    "check_fused_head",
    "check_left_padding",
    "check_packing",
    "check_policy",
    "check_prompts_fit",
    "check_quantization",
    "check_starting_model",
    "check_stop_id",
    "check_token_ids",
    "context_length",
    "copy_adapter",
    "count_positions_from_mask_",
    "disable_adapters",
    "disable_dropout_",
    "has_adapter",
    "hidden_size_of",
    "is_adapter",
    "is_quantized",
    "is_reward_model",
    "load_adapter_state",
    "load_causal_lm",
    "load_config",
    "load_reward_model",
    "load_tokenizer",
    "prepare_for_lora_",
    "quantization_kwargs",
    "refuse_encoder",
    "refuse_left_padding",
    "refuse_logits_unknown_to_trl",
    "refuse_packing",
    "reward_label_count",
    "save_adapter",
    "save_reward_model_config",
    "saved_eos_ids",
    "text_config",
    "token_count",
    "trainable_to_float32_",
    "transform_logits",
    "use_adapter",
    "vocabulary_size",
    "will_be_quantized",
]
