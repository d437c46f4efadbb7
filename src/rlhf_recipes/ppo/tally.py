"""Sums and counts of an update, so that its metrics are exact for any number of minibatches and processes."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf_recipes.tensors import Reduce, alone, masked_sum


class Tally:
    """Collects masked values by name; `means` gives each name's mean over all that was added, in all processes."""

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


class UpdateLog:
    """The metrics of each update: what its rollout showed, joined with what its optimizer steps showed."""

    def __init__(self, episodes: int) -> None:
        self.episodes = episodes  # of all processes in one update
        self.steps = Tally()  # what the optimizer steps since the rollout add to
        self._rollout: dict[str, float] = {}
        self._ended: list[dict[str, float]] = []
        self._started = 0.0

    def begin(self, rollout: Mapping[str, float]) -> None:
        """A rollout was collected; rollout: its metrics, ``time/rollout`` in seconds among them."""
        self._rollout, self._started = dict(rollout), time.perf_counter()

    def end(self, reduce: Reduce = alone) -> None:
        """The optimizer steps on that rollout are done."""
        means = self.steps.means(reduce)
        means["val/ratio_var"] = max(0.0, means["val/ratio_var"] - means["val/ratio"] ** 2)
        means["time/update"] = time.perf_counter() - self._started
        means["eps"] = self.episodes / (self._rollout["time/rollout"] + means["time/update"])
        self._ended.append(self._rollout | means)

    def drain(self) -> dict[str, float]:
        """The mean of each metric over the updates that ended since the last call; empty if none did."""
        updates, self._ended = self._ended, []
        if not updates:
            return {}
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[-1]}
        return means | {"episode": updates[-1]["episode"]}
