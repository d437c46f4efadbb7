"""Models and tokenizers: from a size, a folder or a Hub id to something that can be trained or asked."""

from rlhf_recipes.models.cache import roomy_cache
from rlhf_recipes.models.gpt2 import SIZES, build_gpt2
from rlhf_recipes.models.hardware import fit_to_hardware, hardware, tokens_at_once
from rlhf_recipes.models.kernels import KeptCasts, casts_kept, quicken, steady_attention
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
from rlhf_recipes.models.prepacked import weights_prepacked
from rlhf_recipes.models.quantized import FrozenArguments, ReadingArguments, asks_for_bits, in_bits, without_traps
from rlhf_recipes.models.sources import file_of, is_adapter
from rlhf_recipes.models.start import Start, check_bits, check_policy, check_start
from rlhf_recipes.models.trunk import UpperLayers, check_upper_layers, freeze_below, lower_layers
from rlhf_recipes.models.unwrapping import base_model, trunk_of

__all__ = [
    "SIZES",
    "FrozenArguments",
    "KeptCasts",
    "ReadingArguments",
    "Start",
    "UpperLayers",
    "asks_for_bits",
    "attach_lora",
    "base_model",
    "build_gpt2",
    "casts_kept",
    "check_bits",
    "check_policy",
    "check_start",
    "check_upper_layers",
    "context_length",
    "file_of",
    "fit_to_hardware",
    "freeze_below",
    "hardware",
    "in_bits",
    "is_adapter",
    "is_judge",
    "is_quantized",
    "load_causal_lm",
    "load_config",
    "load_judge",
    "load_tokenizer",
    "lower_layers",
    "positive_label_count",
    "prepare_for_lora",
    "quicken",
    "read_left_padding",
    "roomy_cache",
    "save_judge_config",
    "steady_attention",
    "tokens_at_once",
    "trainable_to_float32",
    "trunk_of",
    "weights_prepacked",
    "without_traps",
]
