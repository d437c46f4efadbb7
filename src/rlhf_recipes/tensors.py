"""Masked arithmetic on tensors, the same for one process and for many.

`reduce` sums a tensor over all processes; left out, there is one process. Masks are bool and come from lengths, never
from comparing ids with a pad id.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """The `reduce` of a single process."""
    return tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """True at the first `lengths[i]` of `width` positions. lengths: (batch,) -> (batch, width)."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the positions where mask is True; what stands elsewhere (NaN included) does not matter."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()


def masked_mean(values: Tensor, mask: Tensor, reduce: Reduce = alone) -> Tensor:
    """Mean over the True positions of all processes; 0 where there is none."""
    total, count = reduce(torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]))
    return total / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = alone) -> Tensor:
    """Scale to unit variance over the True positions of all processes, and to mean 0 unless `shift_mean` is False.

    The variance is the unbiased one. Fewer than two positions are left unscaled: they have no variance.
    """
    mean = masked_mean(values, mask, reduce)
    squares, count = reduce(torch.stack([masked_sum((values - mean) ** 2, mask), mask.sum().to(values.dtype)]))
    scale = torch.rsqrt(squares / (count - 1) + 1e-8) if count > 1 else torch.ones_like(mean)
    whitened = (values - mean) * scale
    return whitened if shift_mean else whitened + mean


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(token) in float32, of the distribution that is sampled from at `temperature`.

    logits: (..., vocabulary), tokens: (...) -> (...).
    """
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the distribution that is sampled from. logits: (..., vocabulary) -> (...)."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Stack rows of unequal length. Returns (ids, mask), both (batch, longest); mask is True on real tokens."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, columns] = torch.as_tensor(row, dtype=torch.long)
        mask[index, columns] = True
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Position ids that count real tokens only, so that padding on the left moves nothing. (batch, width)."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
