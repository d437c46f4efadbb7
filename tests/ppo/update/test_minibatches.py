"""Tests of `RolloutLoader`: the order of prompts and the split of rollouts into minibatches, counted one by one."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_recipes.ppo.update.minibatches import RolloutLoader


class Rows:
    """A rollout that holds the numbers of its prompts only."""

    def __init__(self, prompts: list[int]) -> None:
        self.prompts = torch.tensor(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def by_length(self, rows: Tensor) -> Tensor:
        return rows

    def select(self, rows: Tensor) -> dict[str, Tensor]:
        return {"prompt": self.prompts[rows], "row": rows}


class RecordedLoader:
    """A loader that records the prompts of each rollout that it collects."""

    def __init__(self, rows: int, steps_done: int = 0, **sizes: int) -> None:
        self.prompts: list[list[int]] = []
        self.first_episodes: list[int] = []
        options = {
            "episodes": 8,
            "epochs": 2,
            "mini_batches": 2,
            "micro_size": 4,
            "accumulation": 2,
            "seed": 0,
        } | sizes
        self.loader = RolloutLoader(rows, self._collect, steps_done=lambda: steps_done, **options)

    def _collect(self, prompts: list[int], first_episode: int) -> Rows:
        self.prompts.append(prompts)
        self.first_episodes.append(first_episode)
        return Rows(prompts)

    def epoch(self, number: int = 0) -> list[dict[str, Any]]:
        self.loader.set_epoch(number)
        return list(self.loader)


@pytest.mark.parametrize("rows", [8, 16, 19, 33])
def test_an_epoch_uses_every_prompt_once_and_fills_the_last_update_from_the_start(rows: int) -> None:
    recorded = RecordedLoader(rows)
    recorded.epoch()
    order = [prompt for prompts in recorded.prompts for prompt in prompts]
    assert sorted(order[:rows]) == list(range(rows))
    assert order[rows:] == order[: len(order) - rows]
    assert [len(prompts) for prompts in recorded.prompts] == [8] * -(-rows // 8)
    assert recorded.first_episodes == [8 * update for update in range(len(recorded.prompts))]


def test_prompt_order_depends_on_seed_and_epoch_only() -> None:
    first, same, other = RecordedLoader(24), RecordedLoader(24), RecordedLoader(24, seed=1)
    splits = [[piece["row"].tolist() for piece in loader.epoch(0) if piece] for loader in (first, same)]
    assert first.prompts == same.prompts and splits[0] == splits[1]
    other.epoch(0)
    assert other.prompts != first.prompts
    first.epoch(1)
    assert first.prompts[3:] != first.prompts[:3] and first.first_episodes[3:] == [24, 32, 40]


@pytest.mark.parametrize(
    ("episodes", "mini_batches", "micro_size", "accumulation"),
    [(8, 1, 8, 1), (8, 1, 2, 4), (8, 2, 4, 2), (8, 4, 2, 4), (8, 8, 4, 2), (6, 3, 3, 2), (12, 2, 4, 3)],
)
def test_every_step_gets_its_micro_batches_and_every_pass_each_episode_once(
    episodes: int, mini_batches: int, micro_size: int, accumulation: int
) -> None:
    sizes = {"mini_batches": mini_batches, "micro_size": micro_size, "accumulation": accumulation, "epochs": 3}
    recorded = RecordedLoader(2 * episodes, episodes=episodes, **sizes)
    pieces = recorded.epoch()
    assert len(pieces) == len(recorded.loader) == 2 * 3 * mini_batches * accumulation
    steps = [pieces[start : start + accumulation] for start in range(0, len(pieces), accumulation)]
    for step in steps:
        micro_batches = [piece for piece in step if piece]
        assert sum(len(piece["row"]) for piece in micro_batches) == episodes // mini_batches
        assert all(1 <= len(piece["row"]) <= micro_size for piece in micro_batches)
        assert step[-1], "the last micro-batch steps the optimizer, so it is never empty"
    for update in range(2):
        for epoch in range(3):
            start = (3 * update + epoch) * mini_batches
            rows = [
                row for step in steps[start : start + mini_batches] for piece in step if piece for row in piece["row"]
            ]
            assert Counter(map(int, rows)) == Counter(range(episodes))


def test_every_pass_over_a_rollout_is_reshuffled() -> None:
    pieces = RecordedLoader(64, episodes=32, epochs=4, mini_batches=2, micro_size=32, accumulation=1).epoch()
    orders = [frozenset(piece["row"].tolist()) for piece in pieces]
    assert len(orders) == 16 and len(set(orders)) == 16


@pytest.mark.parametrize(("processes", "mini_batches"), [(2, 2), (2, 4), (4, 2), (4, 1), (2, 8)])
def test_minibatches_do_not_depend_on_the_number_of_processes(processes: int, mini_batches: int) -> None:
    """Each process gets the same number of episodes of each minibatch."""
    sizes = {"episodes": 32, "mini_batches": mini_batches, "micro_size": 32, "accumulation": 1}
    expected = [sorted(piece["row"].tolist()) for piece in RecordedLoader(64, **sizes).epoch()]
    share = 32 // processes
    parts = []
    for process in range(processes):
        recorded = RecordedLoader(64, **sizes, process=process)
        loader, collect = recorded.loader, recorded.loader.collect
        loader.collect = lambda rows, first, c=collect, p=process: c(rows[p * share : (p + 1) * share], first)
        parts.append([(piece["row"] + process * share).tolist() for piece in recorded.epoch()])
    for step, rows in enumerate(expected):
        shards = [part[step] for part in parts]
        assert sorted(row for shard in shards for row in shard) == rows
        assert {len(shard) for shard in shards} == {32 // mini_batches // processes}


def test_the_loader_resumes_at_the_update_of_the_step_counter() -> None:
    """An epoch has 5 updates of 4 steps. After 12 steps update 4 is next; after 28, update 3 of epoch 2."""
    uninterrupted = RecordedLoader(40)
    uninterrupted.epoch(0)
    uninterrupted.epoch(1)
    resumed = RecordedLoader(40, steps_done=12)
    resumed.epoch(0)
    assert resumed.prompts == uninterrupted.prompts[3:5] and resumed.first_episodes == [24, 32]
    resumed_later = RecordedLoader(40, steps_done=28)
    resumed_later.epoch(1)
    assert resumed_later.prompts == uninterrupted.prompts[7:] and resumed_later.first_episodes == [56, 64, 72]
