"""Sampling answers: prompts in, completions out."""

from rlhf_recipes.generation.sampling import Completions, Sampling, generate, row_seed, sample, stop_ids

__all__ = ["Completions", "Sampling", "generate", "row_seed", "sample", "stop_ids"]
