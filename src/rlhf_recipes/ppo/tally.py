"""Sums and counts of an update, so that its metrics are exact for any number of minibatches and processes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_recipes.tensors import Reduce, alone, masked_sum


class Tally:
    """Collects masked values under a name; `means` gives each name's mean over all that was added, in all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """values: tensors of the mask's shape. Only the True positions count."""
        for name, value in values.items():
            value = value.detach().double()
            entry = torch.stack([masked_sum(value, mask), mask.sum().double()])
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def means(self, reduce: Reduce = alone) -> dict[str, float]:
        """Mean of each name; every process must have added the same names. The tally is empty afterwards."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names]))
        self._sums = {}
        return {name: (total / count.clamp(min=1)).item() for name, (total, count) in zip(names, totals, strict=True)}
