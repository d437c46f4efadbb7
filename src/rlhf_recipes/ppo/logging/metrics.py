"""Sums and counts of an update, so that its metrics are exact for any number of minibatches and processes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_recipes.core.tensors import MaskedMeans, Reduce, identity


class UpdateMetrics:
    """The metrics of each update: what its rollout showed, joined with what its optimizer steps showed."""

    def __init__(self, episodes: int) -> None:
        self.episodes = episodes  # of all processes in one update
        self.steps = MaskedMeans()  # what the optimizer steps since the rollout add to
        self._rollout: dict[str, float] = {}
        self._ended: list[dict[str, float]] = []
        self._started = time.perf_counter()

    def begin(self, rollout: Mapping[str, float]) -> None:
        """A rollout was collected; rollout: its metrics, ``time/rollout`` in seconds among them."""
        self._rollout, self._started = dict(rollout), time.perf_counter()

    def end(self, reduce: Reduce = identity) -> dict[str, float]:
        """The optimizer steps on that rollout are done. Returns the metrics of the update."""
        means = self.steps.means(reduce)
        if means:
            means["val/ratio_var"] = max(0.0, means["val/ratio_var"] - means["val/ratio"] ** 2)
        means["time/update"] = time.perf_counter() - self._started
        seconds = self._rollout["time/rollout"] + means["time/update"]
        means["eps"] = self.episodes / seconds
        means["time/tokens_per_second"] = means["eps"] * self._rollout["completions/mean_length"]
        self._ended.append(self._rollout | means)
        return self._ended[-1]

    def drain(self) -> dict[str, float]:
        """The mean of each metric over the updates that ended since the last call; empty if none did."""
        updates, self._ended = self._ended, []
        if not updates:
            return {}
        names = dict.fromkeys(name for update in updates for name in update)
        found = {name: [update[name] for update in updates if name in update] for name in names}
        return {name: sum(each) / len(each) for name, each in found.items()} | {"episode": updates[-1]["episode"]}

    def state(self) -> dict[str, Any]:
        """All of it, as JSON takes it: a run that is resumed logs what the uninterrupted one would have."""
        return {"steps": self.steps.state(), "rollout": self._rollout, "ended": self._ended}

    def restore(self, states: Sequence[Mapping[str, Any]], device: torch.device, counts: bool = True) -> None:
        """states: of one process or of several, whose steps are added up (see `MaskedMeans.restore`)."""
        self.steps.restore([state["steps"] for state in states], device, counts)
        self._rollout, self._ended = dict(states[0]["rollout"]), list(states[0]["ended"])
        self._started = time.perf_counter()
