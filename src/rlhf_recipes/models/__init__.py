"""Models and tokenizers: from a size, a folder or a Hub id to something that can be trained or asked."""

from rlhf_recipes.models.gpt2 import SIZES, build_gpt2
from rlhf_recipes.models.hardware import fit_to_hardware, hardware
from rlhf_recipes.models.loading import (
    attach_lora,
    context_length,
    is_adapter,
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
from rlhf_recipes.models.start import Start, check_policy, check_start

__all__ = [
    "SIZES",
    "Start",
    "attach_lora",
    "build_gpt2",
    "check_policy",
    "check_start",
    "context_length",
    "fit_to_hardware",
    "hardware",
    "is_adapter",
    "is_judge",
    "is_quantized",
    "load_causal_lm",
    "load_config",
    "load_judge",
    "load_tokenizer",
    "positive_label_count",
    "prepare_for_lora",
    "read_left_padding",
    "save_judge_config",
    "trainable_to_float32",
]
