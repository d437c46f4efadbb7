"""Models and tokenizers: from a size, a folder or a Hub id to something that can be trained or asked."""

from rlhf_recipes.models.gpt2 import SIZES, build_gpt2
from rlhf_recipes.models.hardware import fit_to_hardware
from rlhf_recipes.models.loading import (
    attach_lora,
    context_length,
    load_causal_lm,
    load_config,
    load_judge,
    load_tokenizer,
    positive_label_count,
)

__all__ = [
    "SIZES",
    "attach_lora",
    "build_gpt2",
    "context_length",
    "fit_to_hardware",
    "load_causal_lm",
    "load_config",
    "load_judge",
    "load_tokenizer",
    "positive_label_count",
]
