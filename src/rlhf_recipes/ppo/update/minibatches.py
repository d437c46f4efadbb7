"""The dataloader of PPO: prompts in, minibatches of a rollout out."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_recipes.generation import row_seed

PROMPT_ORDER = -1  # takes the place of an epoch in the seed of the order of the prompts


class Selectable(Protocol):
    """What the loader needs of a rollout."""

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> dict[str, Tensor]: ...

    def by_length(self, rows: Tensor) -> Tensor: ...


class RolloutLoader:
    """Iterates over the prompts, collects a rollout with the current policy, and yields its minibatches.

    An epoch is one pass over the prompts, in an order drawn from `seed` and the epoch. Its last update is filled up from the
    start of the same order, so that each update has all its episodes.

    Each optimizer step gets exactly `accumulation` micro-batches of at most `micro_size` episodes, since `Trainer` counts
    them. Where a minibatch needs fewer, the first ones are empty. Once `target_kl` has ended the update, all its remaining
    micro-batches are empty: such a step changes no weight.

    A resumed run continues at the optimizer step where it stopped. In the middle of an update, `collect` is called again and
    must return the saved rollout.

    Args:
        rows: the number of prompts.
        collect: (indices of the prompts of all processes, index of the first episode) -> this process's rollout.
        episodes: of all processes in one update. epochs: passes over the episodes of an update.
        steps_done: returns the optimizer steps of the run so far. ended: returns whether the current update is over.
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
        ended: Callable[[], bool] = lambda: False,
        process: int = 0,
    ) -> None:
        self.rows, self.collect, self.episodes, self.seed = rows, collect, episodes, seed
        self.epochs, self.mini_batches = epochs, mini_batches
        self.micro_size, self.accumulation = micro_size, accumulation
        self.steps_done, self.ended, self.process = steps_done, ended, process
        self.epoch = 0
        self.batch_size = micro_size
        self.dataset = range(rows)  # Trainer counts its examples

    @classmethod
    def of(
        cls, config: Any, rows: int, collect: Callable[[list[int], int], Selectable], **state: Any
    ) -> "RolloutLoader":
        """Make a loader with the sizes of a `PPOConfig`."""
        return cls(
            rows,
            collect,
            episodes=config.episodes_per_update,
            epochs=config.num_ppo_epochs,
            mini_batches=config.num_mini_batches,
            micro_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            process=config.process_index,
            **state,
        )

    @property
    def updates(self) -> int:
        """The number of updates in one pass over the prompts."""
        return -(-self.rows // self.episodes)

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps in one pass over the prompts."""
        return self.updates * self.epochs * self.mini_batches

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(self.rows, generator=self._generator(self.epoch, PROMPT_ORDER)).tolist()
        finished_updates, steps_in_update = divmod(self.steps_done(), self.epochs * self.mini_batches)
        for update in range(max(0, finished_updates - self.epoch * self.updates), self.updates):
            episodes = range(update * self.episodes, (update + 1) * self.episodes)
            number = self.epoch * self.updates + update
            rollout = self.collect([order[index % self.rows] for index in episodes], number * self.episodes)
            first = steps_in_update if number == finished_updates else 0
            for micro_batches in self.optimizer_steps(rollout, number, first):
                yield from micro_batches

    def optimizer_steps(self, rollout: Selectable, number: int, first: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Yield the micro-batches of each optimizer step on the rollout of update `number`, from the `first` step on."""
        for epoch in range(self.epochs):
            minibatches = self._minibatches(len(rollout), self._generator(number, epoch))
            for index, rows in enumerate(minibatches, start=epoch * self.mini_batches):
                if index < first:
                    continue
                # Sorting changes only the padding: which episodes share a micro-batch has no other effect.
                parts = () if self.ended() else rollout.by_length(rows).split(self.micro_size)
                empty: list[dict[str, Any]] = [{}] * (self.accumulation - len(parts))
                yield empty + [rollout.select(part) for part in parts]

    def _minibatches(self, share: int, generator: torch.Generator) -> Tensor:
        """Return this process's rows of each minibatch of a pass, (mini_batches, share / mini_batches).

        The episodes of each group of `mini_batches` consecutive ones go into different minibatches, in random order. So the
        minibatches are the same for any number of processes, and each process has an equal share of each.
        """
        groups, group_size = share // self.mini_batches, self.mini_batches
        order = torch.rand(self.episodes // group_size, group_size, generator=generator).argsort(dim=1)
        own = order[self.process * groups : (self.process + 1) * groups]
        return (own + torch.arange(groups)[:, None] * group_size).T

    def _generator(self, number: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(row_seed(row_seed(self.seed, number), epoch))
