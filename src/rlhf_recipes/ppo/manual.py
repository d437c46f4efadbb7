"""One update on episodes that were played elsewhere, for those who write the loop themselves."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DummyScheduler
from transformers.integrations.deepspeed import deepspeed_init

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.ppo.rollout.rollout import Rollout


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
    if not isinstance(trainer.optimizer, AcceleratedOptimizer) or trainer.lr_scheduler is None:
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
    """Optimizer, schedule and wrapper, for as many updates as the arguments ask for.

    Raises:
        UserError: they do not say how many, and the schedule has to know.
    """
    args = trainer.args
    updates = math.ceil((args.total_episodes or 0) / args.episodes_per_update)
    steps = args.max_steps if args.max_steps > 0 else updates * args.steps_per_update
    if (
        steps <= 0
        and trainer.lr_scheduler is None
        and not str(args.lr_scheduler_type).endswith(("constant", "CONSTANT"))
    ):
        raise UserError(
            f"lr_scheduler_type {args.lr_scheduler_type} has to know how long a loop of step() goes on; set "
            "total_episodes or max_steps, or lr_scheduler_type constant"
        )
    steps = max(1, steps)
    if args.activation_checkpointing:
        options = dict(args.activation_checkpointing_kwargs or {})
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
    trainer.model.to(args.device)
    if trainer.is_deepspeed_enabled:
        trainer.optimizer, trainer.lr_scheduler = deepspeed_init(trainer, num_training_steps=steps)
    else:
        trainer.create_optimizer()
    prepare = trainer.accelerator.prepare
    if isinstance(trainer.lr_scheduler, DummyScheduler):  # of an optimizer that DeepSpeed's configuration names
        prepared = prepare(trainer.model, trainer.optimizer, trainer.lr_scheduler)
        trainer.model_wrapped, trainer.optimizer, trainer.lr_scheduler = prepared
    else:
        trainer.model_wrapped, trainer.optimizer = prepare(trainer.model, trainer.optimizer)
    trainer.create_scheduler(num_training_steps=steps)  # if there is none yet
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed = trainer.model_wrapped  # which Trainer saves
    torch.manual_seed(args.seed)
