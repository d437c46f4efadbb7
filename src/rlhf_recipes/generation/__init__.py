"""Sampling: answers to prompts, reproducible for any batch size."""

from rlhf_recipes.generation.sampling import (
    Completions,
    Sampling,
    check_turn_end,
    generate,
    reset_generation_config_,
    row_seed,
    sample,
    stop_ids,
)

__all__ = [
    "Completions",
    "Sampling",
    "check_turn_end",
    "generate",
    "reset_generation_config_",
    "row_seed",
    "sample",
    "stop_ids",
]
