"""The walk over the prompts and the cutting of rollouts into minibatches, counted one by one."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_recipes.ppo.update.minibatches import RolloutLoader


class Rows:
    """A rollout that knows only which prompts it holds."""

    def __init__(self, prompts: list[int]) -> None:
        self.prompts = torch.tensor(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def by_length(self, rows: Tensor) -> Tensor:
        return rows

    def select(self, rows: Tensor) -> dict[str, Tensor]:
        return {"prompt": self.prompts[rows], "row": rows}


class Walk:
    """A loader, and what it asked to have collected."""

    def __init__(self, rows: int, steps_done: int = 0, **sizes: int) -> None:
        self.asked: list[list[int]] = []
        self.first_episodes: list[int] = []
        known = {"episodes": 8, "epochs": 2, "mini_batches": 2, "micro_size": 4, "accumulation": 2, "seed": 0} | sizes
        self.loader = RolloutLoader(rows, self._collect, steps_done=lambda: steps_done, **known)

    def _collect(self, prompts: list[int], first_episode: int) -> Rows:
        self.asked.append(prompts)
        self.first_episodes.append(first_episode)
        return Rows(prompts)

    def epoch(self, number: int = 0) -> list[dict[str, Any]]:
        self.loader.set_epoch(number)
        return list(self.loader)


@pytest.mark.parametrize("rows", [8, 16, 19, 33])
def test_an_epoch_uses_every_prompt_once_and_fills_the_last_update_from_the_start(rows: int) -> None:
    walk = Walk(rows)
    walk.epoch()
    asked = [prompt for prompts in walk.asked for prompt in prompts]
    assert sorted(asked[:rows]) == list(range(rows))
    assert asked[rows:] == asked[: len(asked) - rows]
    assert [len(prompts) for prompts in walk.asked] == [8] * -(-rows // 8)
    assert walk.first_episodes == [8 * update for update in range(len(walk.asked))]


def test_prompt_order_depends_on_seed_and_epoch_only() -> None:
    walk, same, other = Walk(24), Walk(24), Walk(24, seed=1)
    cuts = [[piece["row"].tolist() for piece in one.epoch(0) if piece] for one in (walk, same)]
    assert walk.asked == same.asked and cuts[0] == cuts[1]
    other.epoch(0)
    assert other.asked != walk.asked
    walk.epoch(1)
    assert walk.asked[3:] != walk.asked[:3] and walk.first_episodes[3:] == [24, 32, 40]


@pytest.mark.parametrize(
    ("episodes", "mini_batches", "micro_size", "accumulation"),
    [(8, 1, 8, 1), (8, 1, 2, 4), (8, 2, 4, 2), (8, 4, 2, 4), (8, 8, 4, 2), (6, 3, 3, 2), (12, 2, 4, 3)],
)
def test_every_step_gets_its_micro_batches_and_every_pass_each_episode_once(
    episodes: int, mini_batches: int, micro_size: int, accumulation: int
) -> None:
    sizes = {"mini_batches": mini_batches, "micro_size": micro_size, "accumulation": accumulation, "epochs": 3}
    walk = Walk(2 * episodes, episodes=episodes, **sizes)
    pieces = walk.epoch()
    assert len(pieces) == len(walk.loader) == 2 * 3 * mini_batches * accumulation
    steps = [pieces[start : start + accumulation] for start in range(0, len(pieces), accumulation)]
    for step in steps:
        held = [piece for piece in step if piece]
        assert sum(len(piece["row"]) for piece in held) == episodes // mini_batches
        assert all(1 <= len(piece["row"]) <= micro_size for piece in held)
        assert step[-1], "the last micro-batch steps the optimizer, so it is never an empty one"
    for update in range(2):
        for epoch in range(3):
            start = (3 * update + epoch) * mini_batches
            rows = [
                row for step in steps[start : start + mini_batches] for piece in step if piece for row in piece["row"]
            ]
            assert Counter(map(int, rows)) == Counter(range(episodes))


def test_every_pass_over_a_rollout_is_reshuffled() -> None:
    pieces = Walk(64, episodes=32, epochs=4, mini_batches=2, micro_size=32, accumulation=1).epoch()
    orders = [frozenset(piece["row"].tolist()) for piece in pieces]
    assert len(orders) == 16 and len(set(orders)) == 16


@pytest.mark.parametrize(("processes", "mini_batches"), [(2, 2), (2, 4), (4, 2), (4, 1), (2, 8)])
def test_minibatches_do_not_depend_on_the_number_of_processes(processes: int, mini_batches: int) -> None:
    """And each process has as much of each to do."""
    sizes = {"episodes": 32, "mini_batches": mini_batches, "micro_size": 32, "accumulation": 1}
    whole = [sorted(piece["row"].tolist()) for piece in Walk(64, **sizes).epoch()]
    share = 32 // processes
    parts = []
    for process in range(processes):
        walk = Walk(64, **sizes, process=process)
        loader, collect = walk.loader, walk.loader.collect
        loader.collect = lambda rows, first, c=collect, p=process: c(rows[p * share : (p + 1) * share], first)
        parts.append([(piece["row"] + process * share).tolist() for piece in walk.epoch()])
    for step, rows in enumerate(whole):
        mine = [part[step] for part in parts]
        assert sorted(row for each in mine for row in each) == rows
        assert {len(each) for each in mine} == {32 // mini_batches // processes}


def test_the_loader_resumes_at_the_update_of_the_step_counter() -> None:
    """Five updates of four steps an epoch: after 12 steps the fourth is next; after 28, the third of the second."""
    whole = Walk(40)
    whole.epoch(0)
    whole.epoch(1)
    later = Walk(40, steps_done=12)
    later.epoch(0)
    assert later.asked == whole.asked[3:5] and later.first_episodes == [24, 32]
    much_later = Walk(40, steps_done=28)
    much_later.epoch(1)
    assert much_later.asked == whole.asked[7:] and much_later.first_episodes == [56, 64, 72]
