"""Rows of unequal length through a transformer without their padding, and its last layer for the chosen tokens alone.

All that stands between two layers of attention treats each token by itself, so the tokens of all rows may go through it as
one row; attention spreads them out over rows again. The last layer's feed-forward part, two thirds of its work, is asked
for no token whose state nobody reads.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Model

ATTENTION = "sdpa_with_short_backward"  # of this house, which takes packed rows (see `kernels`)
# Rows or columns: what the bfloat16 matrix units of processors and GPUs work on at a time. In whole tiles a token's numbers do
# not depend on how many others come along, in float32 either: some libraries add up in another order where fewer than four
# rows are multiplied, or where the width of attention is no multiple of eight.
TILE = 16


class PackedLayout(NamedTuple):
    """Where each of the tokens of several rows stands, first in one row of them all, then in rows with padding.

    `total` is the number of tokens, and what fills it up to whole tiles. `asked`: of which tokens somebody reads the last
    state, (n,) long; None: of all.
    """

    slots: Tensor  # (tokens,) long: of each token, its place in (rows x width)
    sources: Tensor  # (rows x width,) long: of each place, its token; of padding any, as nothing real looks at it
    rows: int
    width: int
    total: int
    asked: Tensor | None = None

    @classmethod
    def of(cls, attention_mask: Tensor, chosen: Tensor | None = None) -> "PackedLayout":
        """attention_mask: (rows, width), each row padded on the right, in whole tiles; chosen: where last states are read."""
        real = attention_mask.flatten().bool()
        slots = real.nonzero().squeeze(1)
        sources = (real.cumsum(0) - 1).clamp(min=0)
        asked = None if chosen is None else chosen.flatten()[slots].nonzero().squeeze(1)
        rows, width = attention_mask.shape
        return cls(slots, sources, rows, width, round_up_to_tile(len(slots)), asked)

    def packed(self, values: Tensor) -> Tensor:
        """(rows, width, ...) -> (1, total, ...)."""
        return _Take.apply(values.flatten(0, 1), self.slots, self.total)[None]

    def spread(self, values: Tensor) -> Tensor:
        """(1, total, ...) -> (rows, width, ...), with whatever in the places of padding, which must get no gradient."""
        return _Spread.apply(values[0], self).unflatten(0, (self.rows, self.width))


def _take(values: Tensor, places: Tensor, total: int) -> Tensor:
    """The values at these places, and zeros behind them. (n, ...) -> (total, ...)."""
    taken = values.new_empty(total, *values.shape[1:])
    torch.index_select(values, 0, places, out=taken[: len(places)])
    taken[len(places) :].zero_()
    return taken


def _put(values: Tensor, places: Tensor, total: int) -> Tensor:
    """The reverse: the first values at these places, and zeros elsewhere. (n, ...) -> (total, ...)."""
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, places, values[: len(places)])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, total: int) -> Tensor:
        ctx.places, ctx.total = places, len(values)
        return _take(values, places, total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _put(gradient, ctx.places, ctx.total), None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, total: int) -> Tensor:
        ctx.places, ctx.total = places, len(values)
        return _put(values, places, total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _take(gradient, ctx.places, ctx.total), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return values.index_select(0, layout.sources)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _take(gradient, ctx.layout.slots, ctx.layout.total), None


def hidden_states_at(trunk: Any, chosen: Tensor, attention_mask: Tensor, **rows: Tensor) -> Tensor:
    """The trunk's last hidden states at the chosen columns of its rows. Returns (chosen columns, hidden_size).

    chosen, attention_mask: (rows, width); rows are padded on the right, where a causal model does not look.
    rows: `input_ids` (rows, width) or `inputs_embeds` (rows, width, hidden_size).
    """
    if not supports_packing(trunk):
        return _states(trunk, attention_mask=torch.ones_like(attention_mask), **rows)[chosen]
    layout = PackedLayout.of(_wide(attention_mask), _wide(chosen))
    return _packed_states(trunk, layout, **rows)[layout.asked]


def hidden_states_of(trunk: Any, attention_mask: Tensor, **rows: Tensor) -> Tensor:
    """The trunk's last hidden states at every column: (rows, width, hidden_size). What padding has is of no use."""
    if not supports_packing(trunk):
        return _states(trunk, attention_mask=torch.ones_like(attention_mask), **rows)
    layout = PackedLayout.of(_wide(attention_mask))
    return layout.spread(_packed_states(trunk, layout, **rows)[None])[:, : attention_mask.shape[1]]


def _wide(values: Tensor) -> Tensor:
    """Whole tiles of columns, with zeros in the new ones. (rows, width, ...)."""
    more = round_up_to_tile(values.shape[1]) - values.shape[1]
    return nn.functional.pad(values, (0, 0) * (values.dim() - 2) + (0, more)) if more else values


def _packed_states(trunk: Any, layout: PackedLayout, **rows: Tensor) -> Tensor:
    """(total, hidden_size)."""
    columns = torch.arange(layout.width, device=layout.slots.device).repeat(layout.rows, 1)
    one_row = {name: layout.packed(_wide(values)) for name, values in rows.items()}
    # A mask of four dimensions is handed on as it is. Attention that goes by the layout does not look at it, and no other
    # kind could use one without columns.
    handed_on = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=layout.slots.device)
    return _states(trunk, **one_row, position_ids=layout.packed(columns), attention_mask=handed_on, packed=layout)[0]


def _states(trunk: Any, **inputs: Any) -> Tensor:
    """Always with a mask: without one transformers warns of ids that look like padding."""
    return torch.as_tensor(trunk(**inputs, use_cache=False).last_hidden_state)


def supports_packing(trunk: Any) -> bool:
    """Whether this is GPT-2, and the attention of all its layers ours: a copied layer has a configuration of its own."""
    if not isinstance(trunk, GPT2Model):
        return False
    parts = [part for part in trunk.modules() if isinstance(part, GPT2Attention)]
    return all(getattr(part.config, "_attn_implementation", None) == ATTENTION for part in parts)


class _LastLayout:
    """What the last layer's attention was told, for what follows it there. A copy of a layer has its own, and starts afresh."""

    layout: PackedLayout | None = None

    def __deepcopy__(self, memo: Any) -> "_LastLayout":
        return _LastLayout()


def narrow_last_layer_(trunk: Any) -> None:
    """From now on the feed-forward part of the last layer is asked for what a packed row's `asked` names, and no more.

    By hooks and not by a part in its place, so that weights keep their names; of parts of the layer and not of the layer, so
    that activations that are computed again in the backward pass are so in the same way.
    """
    layer, told = trunk.h[-1], _LastLayout()
    if not any(_is_narrowing(hook) for hook in layer.mlp._forward_pre_hooks.values()):
        layer.attn.register_forward_pre_hook(partial(_note, told), with_kwargs=True)
        layer.mlp.register_forward_pre_hook(partial(_narrow, told))
        layer.mlp.register_forward_hook(partial(_widen, told))


def _is_narrowing(hook: Any) -> bool:
    return isinstance(hook, partial) and hook.func is _narrow


def _note(told: _LastLayout, attention: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
    told.layout = named.get("packed")


def _narrow(told: _LastLayout, feed_forward: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    layout = told.layout
    if layout is None or layout.asked is None:
        return inputs
    return (_Take.apply(inputs[0][0], layout.asked, round_up_to_tile(len(layout.asked)))[None],)


def _widen(told: _LastLayout, feed_forward: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    layout = told.layout
    if layout is None or layout.asked is None:
        return output
    return _Put.apply(output[0], layout.asked, layout.total)[None]


def pad_to_tile(values: Tensor) -> Tensor:
    """(rows, ...) -> (whole tiles, ...), with zeros behind."""
    return nn.functional.pad(values, (0, 0) * (values.dim() - 1) + (0, round_up_to_tile(len(values)) - len(values)))


def round_up_to_tile(count: int) -> int:
    return -(-count // TILE) * TILE
