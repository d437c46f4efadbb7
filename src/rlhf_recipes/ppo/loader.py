"""Prompts in, minibatches out: the rollout as Trainer's data source."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_recipes.generation import row_seed


class Selectable(Protocol):
    """A rollout, as far as the loader knows it."""

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> dict[str, Tensor]: ...


class RolloutLoader:
    """The training data of PPO: walks the prompts, collects a rollout with the current policy, yields its minibatches.

    An epoch is one pass over the prompts in an order drawn from `seed` and the epoch. Its last update is filled up
    from the start of the same order, so each update has all its episodes. `collect` gets the prompts' row numbers, all
    processes' in order, and the number of the first episode; it returns this process's rollout.

    Each optimizer step gets exactly `accumulation` micro-batches of at most `micro_size` episodes, since Trainer
    counts them; where a minibatch needs fewer, the first ones are empty.
    """

    def __init__(
        self,
        rows: int,
        collect: Callable[[list[int], int], Selectable],
        *,
        episodes: int,
        epochs: int,
        mini_batches: int,
        micro_size: int,
        accumulation: int,
        seed: int,
        steps_done: Callable[[], int],
    ) -> None:
        self.rows, self.collect, self.episodes, self.seed = rows, collect, episodes, seed
        self.epochs, self.mini_batches = epochs, mini_batches
        self.micro_size, self.accumulation, self.steps_done = micro_size, accumulation, steps_done
        self.epoch = 0
        self.batch_size = micro_size
        self.dataset = range(rows)  # what Trainer counts as examples

    @property
    def updates(self) -> int:
        """Updates in one pass over the prompts."""
        return -(-self.rows // self.episodes)

    def __len__(self) -> int:
        return self.updates * self.epochs * self.mini_batches * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(self.rows, generator=self._generator(self.epoch, -1)).tolist()
        done = self.steps_done() // (self.epochs * self.mini_batches)  # a resumed run goes on where it stopped
        for update in range(max(0, done - self.epoch * self.updates), self.updates):
            wanted = range(update * self.episodes, (update + 1) * self.episodes)
            number = self.epoch * self.updates + update
            rollout = self.collect([order[index % self.rows] for index in wanted], number * self.episodes)
            yield from self._minibatches(rollout, number)

    def _minibatches(self, rollout: Selectable, number: int) -> Iterator[dict[str, Any]]:
        for epoch in range(self.epochs):
            order = torch.randperm(len(rollout), generator=self._generator(number, epoch))
            for rows in order.chunk(self.mini_batches):
                pieces = rows.split(self.micro_size)
                yield from ({} for _ in range(self.accumulation - len(pieces)))
                yield from (rollout.select(piece) for piece in pieces)

    def _generator(self, number: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(row_seed(row_seed(self.seed, number), epoch))
