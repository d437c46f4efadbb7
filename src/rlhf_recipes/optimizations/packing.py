"""Packed rows: a GPT-2 reads rows of unequal length as one row without padding, and its last MLP only selected tokens.

Between two attention layers a transformer treats each token by itself, so the tokens of all rows can pass as one row.
Attention restores the rows. The last layer's MLP, two thirds of that layer's work, skips tokens whose state is not
read. Each token's state is the same as in a padded batch, up to rounding.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Model

# The name under which transformers knows `attention.short_attention`, which takes packed rows.
SHORT_ATTENTION = "sdpa_with_short_backward"
# Rows or columns that a bfloat16 matrix unit works on at a time. With rows padded to a multiple of
# it, a token's numbers do not depend on its batch. That holds for float32, too: some libraries add
# in another order below four rows, or if the width of attention is no multiple of eight.
TILE = 16


class PackedLayout(NamedTuple):
    """Where each token of several rows is: in one packed row, and in the padded rows.

    slots: (tokens,) long: the index of each token in the flattened padded rows (rows x width).
    sources: (rows x width,) long: the token at each index; for padding any token, since nothing reads it.
    rows, width: shape of the padded rows; width is a multiple of `TILE`.
    total: length of the packed row: the number of tokens, rounded up to a multiple of `TILE`.
    selected: (n,) long: the tokens whose last state is read; None: all of them.
    """

    slots: Tensor
    sources: Tensor
    rows: int
    width: int
    total: int
    selected: Tensor | None = None

    @classmethod
    def of(cls, attention_mask: Tensor, selected: Tensor | None = None) -> "PackedLayout":
        """Build the layout of rows padded on the right to a multiple of `TILE`.

        attention_mask: (rows, width). selected: (rows, width), True where the last state is read.
        """
        real = attention_mask.flatten().bool()
        slots = real.nonzero().squeeze(1)
        sources = (real.cumsum(0) - 1).clamp(min=0)
        tokens = None if selected is None else selected.flatten()[slots].nonzero().squeeze(1)
        rows, width = attention_mask.shape
        return cls(slots, sources, rows, width, round_up_to_tile(len(slots)), tokens)

    def packed(self, values: Tensor) -> Tensor:
        """Pack padded rows into one: (rows, width, ...) -> (1, total, ...)."""
        return _Take.apply(values.flatten(0, 1), self.slots, self.total)[None]

    def spread(self, values: Tensor) -> Tensor:
        """Restore padded rows: (1, total, ...) -> (rows, width, ...).

        Padding holds arbitrary values and must get no gradient.
        """
        return _Spread.apply(values[0], self).unflatten(0, (self.rows, self.width))


def _take(values: Tensor, indices: Tensor, total: int) -> Tensor:
    """Gather the values at the indices, followed by zeros: (n, ...) -> (total, ...)."""
    taken = values.new_empty(total, *values.shape[1:])
    torch.index_select(values, 0, indices, out=taken[: len(indices)])
    taken[len(indices) :].zero_()
    return taken


def _put(values: Tensor, indices: Tensor, total: int) -> Tensor:
    """Scatter the first values to the indices, with zeros elsewhere: (n, ...) -> (total, ...)."""
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, indices, values[: len(indices)])


class _Take(torch.autograd.Function):
    """`_take`, whose gradient is `_put`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, total: int) -> Tensor:
        ctx.indices, ctx.total = indices, len(values)
        return _take(values, indices, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _put(grad, ctx.indices, ctx.total), None, None


class _Put(torch.autograd.Function):
    """`_put`, whose gradient is `_take`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, total: int) -> Tensor:
        ctx.indices, ctx.total = indices, len(values)
        return _put(values, indices, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _take(grad, ctx.indices, ctx.total), None, None


class _Spread(torch.autograd.Function):
    """Copy each token to its index in the padded rows. Only tokens, not padding, pass a gradient back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return values.index_select(0, layout.sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _take(grad, ctx.layout.slots, ctx.layout.total), None


def hidden_states_at(trunk: Any, selected: Tensor, attention_mask: Tensor, **rows: Tensor) -> Tensor:
    """Return the trunk's last hidden states at the selected columns: (selected columns, hidden_size).

    selected, attention_mask: (rows, width). Rows are padded on the right, where a causal model's states do not depend
    on the padding.
    rows: `input_ids` (rows, width) or `inputs_embeds` (rows, width, hidden_size).
    """
    if not supports_packing(trunk):
        return _last_states(trunk, attention_mask=torch.ones_like(attention_mask), **rows)[selected]
    layout = PackedLayout.of(_pad_width(attention_mask), _pad_width(selected))
    return _packed_states(trunk, layout, **rows)[layout.selected]


def hidden_states_of(trunk: Any, attention_mask: Tensor, **rows: Tensor) -> Tensor:
    """Return the trunk's last hidden states at every column: (rows, width, hidden_size). Padding is arbitrary."""
    if not supports_packing(trunk):
        return _last_states(trunk, attention_mask=torch.ones_like(attention_mask), **rows)
    layout = PackedLayout.of(_pad_width(attention_mask))
    return layout.spread(_packed_states(trunk, layout, **rows)[None])[:, : attention_mask.shape[1]]


def _pad_width(values: Tensor) -> Tensor:
    """Pad the columns with zeros to a multiple of `TILE`: (rows, width, ...)."""
    missing = round_up_to_tile(values.shape[1]) - values.shape[1]
    return nn.functional.pad(values, (0, 0) * (values.dim() - 2) + (0, missing)) if missing else values


def _packed_states(trunk: Any, layout: PackedLayout, **rows: Tensor) -> Tensor:
    """Return the trunk's last hidden states of the packed row: (total, hidden_size)."""
    columns = torch.arange(layout.width, device=layout.slots.device).repeat(layout.rows, 1)
    packed_rows = {name: layout.packed(_pad_width(values)) for name, values in rows.items()}
    # transformers passes on a mask of four dimensions as it is. `short_attention` ignores it for a
    # packed row; any other attention would fail on a mask without columns.
    empty_mask = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=layout.slots.device)
    return _last_states(
        trunk, **packed_rows, position_ids=layout.packed(columns), attention_mask=empty_mask, packed=layout
    )[0]


def _last_states(trunk: Any, **inputs: Any) -> Tensor:
    """Return the last hidden states. `inputs` has a mask, or transformers warns of ids that look like padding."""
    return torch.as_tensor(trunk(**inputs, use_cache=False).last_hidden_state)


def supports_packing(trunk: Any) -> bool:
    """Whether this is a GPT-2 with `short_attention` in all its layers. A copied layer may have another config."""
    if not isinstance(trunk, GPT2Model):
        return False
    attentions = [module for module in trunk.modules() if isinstance(module, GPT2Attention)]
    return all(getattr(module.config, "_attn_implementation", None) == SHORT_ATTENTION for module in attentions)


class _CurrentLayout:
    """The layout that the last layer's attention got in this forward pass, for the MLP after it.

    A deep copy is empty, so that a copied layer does not read the layout of the original.
    """

    layout: PackedLayout | None = None

    def __deepcopy__(self, memo: Any) -> "_CurrentLayout":
        return _CurrentLayout()


def narrow_last_layer_(trunk: Any) -> None:
    """Add hooks to the last layer of a GPT-2 trunk so that its MLP computes only the selected tokens of a packed row.

    Hooks keep the names of the weights, which a replaced module would not. They are on parts of the layer, not on the
    layer, so that activation checkpointing recomputes them in the same way. Calling it twice adds nothing.
    """
    layer, current = trunk.h[-1], _CurrentLayout()
    if not any(_is_narrowing(hook) for hook in layer.mlp._forward_pre_hooks.values()):
        layer.attn.register_forward_pre_hook(partial(_store_layout, current), with_kwargs=True)
        layer.mlp.register_forward_pre_hook(partial(_narrow, current))
        layer.mlp.register_forward_hook(partial(_widen, current))


def _is_narrowing(hook: Any) -> bool:
    return isinstance(hook, partial) and hook.func is _narrow


def _store_layout(current: _CurrentLayout, attention: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
    current.layout = options.get("packed")


def _narrow(current: _CurrentLayout, mlp: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Reduce the MLP's input to the selected tokens: (1, total, ...) -> (1, selected tokens and padding, ...)."""
    layout = current.layout
    if layout is None or layout.selected is None:
        return inputs
    return (_Take.apply(inputs[0][0], layout.selected, round_up_to_tile(len(layout.selected)))[None],)


def _widen(current: _CurrentLayout, mlp: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Put the MLP's output back among all tokens, with zeros at the others."""
    layout = current.layout
    if layout is None or layout.selected is None:
        return output
    return _Put.apply(output[0], layout.selected, layout.total)[None]


def pad_to_tile(values: Tensor) -> Tensor:
    """Append rows of zeros up to a multiple of `TILE`: (rows, ...) -> (multiple, ...)."""
    return nn.functional.pad(values, (0, 0) * (values.dim() - 1) + (0, round_up_to_tile(len(values)) - len(values)))


def round_up_to_tile(count: int) -> int:
    """Round up to a multiple of `TILE`."""
    return -(-count // TILE) * TILE
