"""A KV cache with spare room, so that most decoding steps copy nothing.

It returns the keys and values of transformers' own cache. Keys kept in float32 change a result by rounding only.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_recipes.core.unwrapping import base_model
from rlhf_recipes.optimizations.packing import SHORT_ATTENTION
from rlhf_recipes.system import BF16_MATRIX_UNIT, bf16_support

CACHE_ARGUMENT = "past_key_values"
SPARE_TOKENS = 64  # room added whenever a buffer is full


class PreallocatedLayer(DynamicLayer):
    """A cache layer that copies its contents once in `SPARE_TOKENS` tokens; transformers' copies them at each token.

    widened: bfloat16 is stored as float32, so that `short_attention` attends in float32.
    """

    def __init__(self, widened: bool = False) -> None:
        super().__init__()
        self.widened = widened
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._buffers: list[Tensor] = []  # keys and values: (batch, heads, tokens and spare tokens, head size)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states, each (batch, heads, tokens, head size). Returns views of all keys and all values."""
        if self.widened and key_states.dtype == torch.bfloat16:
            key_states, value_states = key_states.float(), value_states.float()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        new_states = (key_states, value_states)
        if not self._buffers or end > self._buffers[0].shape[2]:
            past = (self.keys, self.values) if start else (None, None)
            self._buffers = [_grown(*pair, end) for pair in zip(past, new_states, strict=True)]
        for buffer, states in zip(self._buffers, new_states, strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        length = self.get_seq_length()
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _grown(past: Tensor | None, states: Tensor, end: int) -> Tensor:
    """Return a buffer for `end` tokens and `SPARE_TOKENS` more, with the past states copied into it."""
    batch, heads, _, size = states.shape
    buffer = states.new_empty(batch, heads, end + SPARE_TOKENS, size)
    if past is not None:
        buffer[:, :, : past.shape[2]] = past
    return buffer


def supports_preallocated_cache(model: Any) -> bool:
    """Return whether the model's cache holds keys and values only, so that rows of it can be dropped.

    Models with a state-space, convolution or linear attention layer have another cache, or take theirs by another name.
    """
    base = base_model(model)
    if CACHE_ARGUMENT not in inspect.signature(type(base).forward).parameters:
        return False
    kinds = {type(layer) for layer in DynamicCache(config=base.config).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def preallocated_cache(config: Any) -> DynamicCache:
    """Return an empty cache for a model of this config; only plain layers are replaced (not sliding windows, say).

    Keys are widened to float32 unless the processor has a bfloat16 matrix unit, which is as fast for one query as for
    many.
    """
    cache = DynamicCache(config=config)
    widened = config._attn_implementation == SHORT_ATTENTION and bf16_support() != BF16_MATRIX_UNIT
    cache.layers = [
        PreallocatedLayer(widened=widened) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
