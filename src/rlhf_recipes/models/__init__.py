"""Models and tokenizers: from a size, a folder or a Hub id to something that can be trained or asked."""

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
from rlhf_recipes.models.gpt2 import SIZES, build_gpt2
from rlhf_recipes.models.loading import (
    attach_lora,
    context_length,
    is_judge,
    is_quantized,
    load_causal_lm,
    load_config,
    load_judge,
    load_tokenizer,
    positive_label_count,
    prepare_for_lora,
    save_judge_config,
    trainable_to_float32,
)
from rlhf_recipes.models.padding import read_left_padding
from rlhf_recipes.models.quantization import FrozenArguments, ReadingArguments, asks_for_bits, in_bits
from rlhf_recipes.models.sources import is_adapter
from rlhf_recipes.models.start import Start, check_bits, check_policy, check_start

__all__ = [
    "ADAPTER_WEIGHTS",
    "REFERENCE_ADAPTER",
    "SIZES",
    "VALUE_ADAPTER",
    "FrozenArguments",
    "ReadingArguments",
    "Start",
    "adapter_parameters",
    "add_adapter_from",
    "asks_for_bits",
    "attach_lora",
    "build_gpt2",
    "check_bits",
    "check_policy",
    "check_start",
    "context_length",
    "copy_adapter",
    "disable_adapters",
    "has_adapter",
    "in_bits",
    "is_adapter",
    "is_judge",
    "is_quantized",
    "load_adapter_state",
    "load_causal_lm",
    "load_config",
    "load_judge",
    "load_tokenizer",
    "positive_label_count",
    "prepare_for_lora",
    "read_left_padding",
    "save_adapter",
    "save_judge_config",
    "trainable_to_float32",
    "use_adapter",
]
