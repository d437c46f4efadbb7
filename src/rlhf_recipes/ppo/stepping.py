"""One update on episodes that were played elsewhere, for those who write the loop themselves."""

import math
from contextlib import nullcontext
from typing import Any

import torch

from rlhf_recipes.arguments import UserError
from rlhf_recipes.ppo.rollout import Rollout


def checked_episodes(queries: Any, responses: Any, scores: Any, share: int) -> list[list[list[int]]]:
    """The ids of queries and of responses as lists, if there are as many of each as an update takes."""
    if not len(queries) == len(responses) == len(scores) == share:
        raise UserError(
            f"step got {len(queries)} queries, {len(responses)} responses and {len(scores)} scores; an update takes "
            f"{share} of each (per_device_train_batch_size x gradient_accumulation_steps)"
        )
    return [[[int(token) for token in row] for row in rows] for rows in (queries, responses)]


def take_update(trainer: Any, rollout: Rollout, number: int) -> None:
    """The optimizer steps that `Trainer` would take on update `number`: same minibatches, clipping and schedule."""
    if trainer.optimizer is None:
        _prepare(trainer)
    args, model = trainer.args, trainer.model_wrapped
    model.train()
    for batches in trainer.rollouts().optimizer_steps(rollout, number):
        _, tokens = trainer.get_batch_samples(iter(batches), len(batches), args.device)
        for index, inputs in enumerate(batches):
            last = index == len(batches) - 1
            trainer.accelerator.gradient_state._set_sync_gradients(last)  # as Trainer does: it collects by itself
            with nullcontext() if last else trainer.accelerator.no_sync(model):
                trainer.training_step(model, inputs, tokens)
        if args.max_grad_norm > 0:
            trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        trainer.state.global_step += 1


def _prepare(trainer: Any) -> None:
    """Optimizer, schedule and wrapper, for as many updates as the arguments ask for."""
    args = trainer.args
    updates = math.ceil((args.total_episodes or 0) / args.episodes_per_update)
    steps = args.max_steps if args.max_steps > 0 else updates * args.steps_per_update
    if steps <= 0 and args.lr_scheduler_type != "constant":
        steps = int(args.num_train_epochs * args.steps_per_update)
    trainer.create_optimizer_and_scheduler(num_training_steps=max(1, steps))
    trainer.model.to(args.device)
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    torch.manual_seed(args.seed)
