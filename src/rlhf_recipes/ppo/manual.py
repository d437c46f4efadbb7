"""What `PPOTrainer.step` needs: checked episodes, and the length of a run that is a loop of the caller."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.step import without_sync


def check_episodes(queries: Any, responses: Any, scores: Any, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of queries and responses as lists.

    Raises:
        UserError: there are not `count` of each, the episodes of one update.
    """
    if not len(queries) == len(responses) == len(scores) == count:
        raise UserError(
            f"step got {len(queries)} queries, {len(responses)} responses and {len(scores)} scores; an update takes "
            f"{count} of each (per_device_train_batch_size x gradient_accumulation_steps)"
        )
    query_ids, response_ids = ([[int(token) for token in row] for row in rows] for rows in (queries, responses))
    return query_ids, response_ids


def schedule_steps(args: PPOConfig, has_scheduler: bool) -> int:
    """Return the number of optimizer steps that a loop of `step` takes, at least 1.

    Raises:
        UserError: neither max_steps nor total_episodes is set, and the learning rate schedule needs the number.
    """
    updates = math.ceil((args.total_episodes or 0) / args.episodes_per_update)
    steps = args.max_steps if args.max_steps > 0 else updates * args.steps_per_update
    constant = str(args.lr_scheduler_type).endswith(("constant", "CONSTANT"))
    if steps <= 0 and not has_scheduler and not constant:
        raise UserError(
            f"lr_scheduler_type {args.lr_scheduler_type} needs the number of steps of your loop; set total_episodes or "
            "max_steps, or lr_scheduler_type constant"
        )
    return max(1, steps)


def accumulate(
    model: nn.Module, accelerator: Any, batches: Sequence[Any], training_step: Callable[[nn.Module, Any], Any]
) -> None:
    """Run `training_step` on each micro-batch; gradients are synchronised over processes in the last one, as in `Trainer`."""
    accelerator.gradient_state._set_sync_gradients(True)
    for index, inputs in enumerate(batches):
        with nullcontext() if index == len(batches) - 1 else without_sync(model, accelerator):
            training_step(model, inputs)
