"""The metrics of each update, exact for any number of minibatches and processes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rlhf_recipes.core.tensors import MaskedMeans, Reduce, identity


class UpdateMetrics:
    """Joins the metrics of a rollout with those of the optimizer steps on it.

    episodes: of all processes in one update.
    """

    def __init__(self, episodes: int) -> None:
        self.episodes = episodes
        self.steps = MaskedMeans()  # of the optimizer steps since the rollout
        self._rollout: dict[str, float] = {}
        self._ended: list[dict[str, float]] = []
        self._started = time.perf_counter()

    def begin(self, rollout: Mapping[str, float]) -> None:
        """Start an update with the metrics of its rollout, among them ``time/rollout`` in seconds."""
        self._rollout, self._started = dict(rollout), time.perf_counter()

    def end(self, reduce: Reduce = identity) -> dict[str, float]:
        """End the update after its optimizer steps, and return its metrics."""
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
        """Return the mean of each metric over the updates that ended since the last call; empty if none did."""
        updates, self._ended = self._ended, []
        if not updates:
            return {}
        names = dict.fromkeys(name for update in updates for name in update)
        values = {name: [update[name] for update in updates if name in update] for name in names}
        return {name: sum(each) / len(each) for name, each in values.items()} | {"episode": updates[-1]["episode"]}

    def state(self) -> dict[str, Any]:
        """Return the state as JSON accepts it, so that a resumed run logs what the uninterrupted one would have logged."""
        return {"steps": self.steps.state(), "rollout": self._rollout, "ended": self._ended}

    def restore(self, states: Sequence[Mapping[str, Any]], device: torch.device, include_sums: bool = True) -> None:
        """Restore `state` from one process, or from several, whose sums are added (see `MaskedMeans.restore`)."""
        self.steps.restore([state["steps"] for state in states], device, include_sums)
        self._rollout, self._ended = dict(states[0]["rollout"]), list(states[0]["ended"])
        self._started = time.perf_counter()
