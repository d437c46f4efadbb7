"""Sampling: answers to prompts, reproducible for any batch size."""

from rlhf_recipes.generation.sampling import Completions, Sampling, generate, row_seed, sample, stop_ids

__all__ = ["Completions", "Sampling", "generate", "row_seed", "sample", "stop_ids"]
