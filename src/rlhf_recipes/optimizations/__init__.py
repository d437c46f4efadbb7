"""Faster forms of the same computation: attention, packing, prepacked weights, KV cache, frozen lower layers.

Delete this room and no result changes beyond rounding.
"""

from rlhf_recipes.optimizations.attention import (
    CastCache,
    ShortCausalAttention,
    cached_casts,
    fuse_kernels_,
    without_cudnn_attention,
)
from rlhf_recipes.optimizations.frozen_trunk import (
    UpperLayers,
    check_layer_count,
    check_layer_names,
    freeze_lower_layers_,
    lower_layers,
)
from rlhf_recipes.optimizations.kv_cache import preallocated_cache, supports_preallocated_cache
from rlhf_recipes.optimizations.packing import SHORT_ATTENTION, TILE, hidden_states_at, hidden_states_of, pad_to_tile
from rlhf_recipes.optimizations.prepacking import prepacked_weights

__all__ = [
    "SHORT_ATTENTION",
    "TILE",
    "CastCache",
    "ShortCausalAttention",
    "UpperLayers",
    "cached_casts",
    "check_layer_count",
    "check_layer_names",
    "freeze_lower_layers_",
    "fuse_kernels_",
    "hidden_states_at",
    "hidden_states_of",
    "lower_layers",
    "pad_to_tile",
    "preallocated_cache",
    "prepacked_weights",
    "supports_preallocated_cache",
    "without_cudnn_attention",
]
