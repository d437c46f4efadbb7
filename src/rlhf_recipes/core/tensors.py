"""Masked arithmetic on tensors, for one process or several.

`reduce` sums a tensor over all processes; the default is that of a single process. Masks are bool tensors. They come
from sequence lengths, never from a comparison of ids with the pad id.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor unchanged: the `reduce` of a single process."""
    return tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Return a mask that is True at the first `lengths[i]` of `width` positions. (batch,) -> (batch, width)."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over the True positions; values elsewhere, NaN included, are ignored."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce = identity) -> Tensor:
    """Return the mean over the True positions of all processes; 0 if no position is True."""
    total, count = reduce(torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]))
    return total / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = identity) -> Tensor:
    """Return the values scaled to unit variance over the True positions of all processes, and shifted to mean 0.

    The variance is unbiased. With fewer than two True positions the values are not scaled. `shift_mean=False` keeps
    the mean.
    """
    mean = masked_mean(values, mask, reduce)
    squares, count = reduce(torch.stack([masked_sum((values - mean) ** 2, mask), mask.sum().to(values.dtype)]))
    scale = torch.rsqrt(squares / (count - 1) + 1e-8) if count > 1 else torch.ones_like(mean)
    whitened = (values - mean) * scale
    return whitened if shift_mean else whitened + mean


def log_probs_and_entropies(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return log p(token) and the entropy, in nats and float32, of the distribution at this sampling temperature.

    logits: (..., vocabulary) in any precision; tokens: (...). Both results have the shape of tokens. Forward and
    backward process a few rows at a time, so there is never a float32 copy of all logits. Autograd saves the logits in
    their own precision, and one entropy per token.
    """
    flat: Any = (logits.flatten(0, -2), tokens.flatten(), temperature)
    log_probs, entropies = _LogProbsAndEntropies.apply(*flat)
    return log_probs.view(tokens.shape), entropies.view(tokens.shape)


class _LogProbsAndEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        log_probs, entropies = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
        for rows in _row_slices(logits):
            log_p = torch.log_softmax(_tempered(logits[rows], temperature), dim=-1)
            log_probs[rows] = log_p.gather(-1, tokens[rows, None]).squeeze(-1)
            entropies[rows] = -(log_p.exp().mul_(log_p)).sum(dim=-1)
        ctx.save_for_backward(logits, tokens, entropies)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor, None, None]:
        """Return the logits' gradient: d log p(token) = [token] - p and dH = -p (log p + H), over the temperature."""
        logits, tokens, entropies = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _row_slices(logits):
            scaled = _tempered(logits[rows], ctx.temperature)
            p = torch.softmax(scaled, dim=-1)
            part = torch.zeros_like(p)
            if of_log_probs is not None:
                weights = of_log_probs[rows, None] / ctx.temperature
                part = (p * -weights).scatter_add_(-1, tokens[rows, None], weights)
            if of_entropies is not None:
                log_p = torch.log_softmax(scaled, dim=-1)
                part -= p * (log_p + entropies[rows, None]) * (of_entropies[rows, None] / ctx.temperature)
            gradient[rows] = part
        return gradient, None, None


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def _row_slices(logits: Tensor) -> list[slice]:
    """Return slices of rows whose float32 copies fit into a CPU's cache, or keep a GPU busy."""
    count = max(1, (2**18 if logits.device.type == "cpu" else 2**26) // logits.shape[-1])
    return [slice(start, start + count) for start in range(0, len(logits), count)]


def batches_by_length(lengths: Sequence[int], max_rows: int, max_tokens: int | None = None) -> list[list[int]]:
    """Return batches of row indices, sorted by length, shortest first, with at most `max_rows` rows in a batch.

    A batch padded to its longest row has at most `max_tokens` tokens (None: no limit). A longer row is a batch alone.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        batch = batches[-1] if batches else []
        tokens = (len(batch) + 1) * lengths[row]
        if not batch or len(batch) == max_rows or (max_tokens is not None and tokens > max_tokens):
            batches.append(batch := [])
        batch.append(row)
    return batches


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right", multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Pad rows of unequal length to one width. Return (ids, mask), both (batch, width); mask is True on real tokens.

    The width is the length of the longest row, rounded up to a multiple of `multiple`.
    """
    width = -(-max((len(row) for row in rows), default=0) // multiple) * multiple
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, columns] = torch.as_tensor(row, dtype=torch.long)
        mask[index, columns] = True
    return ids, mask


def position_ids(mask: Tensor) -> Tensor:
    """Return position ids that count real tokens only, so left padding does not shift them. (batch, width)."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


class MaskedMeans:
    """Accumulate masked values by name; `means` returns the mean of each name over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """Add the values at the True positions. values: tensors of the mask's shape, by name."""
        for name, value in values.items():
            value = value.detach().double()
            entry = torch.stack([masked_sum(value, mask), mask.sum().double()])
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def means(self, reduce: Reduce = identity) -> dict[str, float]:
        """Return the mean of each name and clear the sums. Every process must have added the same names."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names]))
        self._sums = {}
        return {name: (total / count.clamp(min=1)).item() for name, (total, count) in zip(names, totals, strict=True)}

    def state(self) -> dict[str, list[float]]:
        """Return [sum, count] of each name in this process, as JSON accepts it."""
        return {name: entry.tolist() for name, entry in self._sums.items()}

    def restore(
        self, states: Sequence[Mapping[str, list[float]]], device: torch.device, include_sums: bool = True
    ) -> None:
        """Replace the sums by the total of several states with the same names; `include_sums=False` keeps only the names."""
        self._sums = {
            name: torch.tensor([state[name] for state in states], dtype=torch.float64, device=device).sum(0)
            * include_sums
            for name in states[0]
        }
