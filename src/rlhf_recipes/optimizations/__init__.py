"""The same numbers in less time: attention, packing, prepacked weights, KV cache, frozen layers.

Without this room no result changes beyond rounding.
"""

from rlhf_recipes.optimizations.attention import KeptCasts, ShortCausalAttention, casts_kept, quicken, steady_attention
from rlhf_recipes.optimizations.frozen_trunk import UpperLayers, check_upper_layers, freeze_below, lower_layers
from rlhf_recipes.optimizations.kv_cache import roomy_cache
from rlhf_recipes.optimizations.packing import ATTENTION, TILE, in_whole_tiles, states_at, states_of
from rlhf_recipes.optimizations.prepacking import weights_prepacked

__all__ = [
    "ATTENTION",
    "TILE",
    "KeptCasts",
    "ShortCausalAttention",
    "UpperLayers",
    "casts_kept",
    "check_upper_layers",
    "freeze_below",
    "in_whole_tiles",
    "lower_layers",
    "quicken",
    "roomy_cache",
    "states_at",
    "states_of",
    "steady_attention",
    "weights_prepacked",
]
