"""Keys and values of the tokens so far, kept where there is room for those to come."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf_recipes.optimizations.packing import ATTENTION
from rlhf_recipes.system import BF16_MATRIX_UNIT, bf16_support

ROOM = 64  # tokens


class PreallocatedLayer(DynamicLayer):
    """transformers' growing cache layer, which copies all it holds for each token; this one copies once in `ROOM`.

    widened: bfloat16 is kept as float32, for `short_attention`, which then attends in float32.
    """

    def __init__(self, widened: bool = False) -> None:
        super().__init__()
        self.widened = widened
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._held: list[Tensor] = []  # keys and values, (batch, heads, tokens and room, size)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states, (batch, heads, tokens, size); returns all keys and all values, as views."""
        if self.widened and key_states.dtype == torch.bfloat16:
            key_states, value_states = key_states.float(), value_states.float()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self._held or end > self._held[0].shape[2]:
            before = (self.keys, self.values) if start else (None, None)
            self._held = [_with_room(*each, end) for each in zip(before, (key_states, value_states), strict=True)]
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, start:end] = states
        self.keys, self.values = (held[:, :, :end] for held in self._held)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        length = self.get_seq_length()
        self._held = [held[indices] for held in self._held]
        self.keys, self.values = (held[:, :, :length] for held in self._held)


def _with_room(before: Tensor | None, states: Tensor, end: int) -> Tensor:
    batch, heads, _, size = states.shape
    held = states.new_empty(batch, heads, end + ROOM, size)
    if before is not None:
        held[:, :, : before.shape[2]] = before
    return held


def preallocated_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of this config. Layers of other kinds (sliding windows, say) stay as they are.

    A processor with a matrix unit attends in bfloat16 as quickly for one query as for many.
    """
    cache = DynamicCache(config=config)
    widened = config._attn_implementation == ATTENTION and bf16_support() != BF16_MATRIX_UNIT
    cache.layers = [
        PreallocatedLayer(widened=widened) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
