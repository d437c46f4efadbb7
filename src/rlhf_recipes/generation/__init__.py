"""Sampling: answers to prompts, reproducible for any batch size."""

from rlhf_recipes.generation.sampling import (
    Completions,
    Sampling,
    check_turn_end,
    generate,
    row_seed,
    sample,
    stop_ids,
)

__all__ = ["Completions", "Sampling", "check_turn_end", "generate", "row_seed", "sample", "stop_ids"]
