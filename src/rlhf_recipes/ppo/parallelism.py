"""In which ways of running on several devices PPO learns, and what DeepSpeed wants to know of it."""

from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.system import (
    cast_like_engine_,
    configures_optimizer,
    fill_bucket_sizes_,
    require_saved_zero_weights,
    zero_stage,
)


def check_parallelism(args: PPOConfig, kind: Any) -> None:
    """Whether PPO can train in the way that it was launched. kind: the `DistributedType`, as far as it is known.

    Raises:
        UserError: Megatron, which rollouts cannot read whole; DataParallel, which trains in another precision than it plays;
            DeepSpeed without ZeRO-2 or ZeRO-3, or with what it cannot do, or that would save no weights.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs; launch one for each with accelerate launch, or set CUDA_VISIBLE_DEVICES "
            "to one"
        )
    if str(kind).endswith("MEGATRON_LM"):
        raise UserError(
            "PPOTrainer does not run under Megatron, which cannot answer with whole weights; launch "
            "accelerate_configs/fsdp2.yaml, deepspeed_zero3.yaml or ddp.yaml"
        )
    stage = zero_stage(args)
    if stage is None:
        if str(kind).endswith("DEEPSPEED"):
            raise UserError(
                "DeepSpeed is on in an Accelerator that PPOConfig knows nothing of; pass its configuration as deepspeed, or "
                "launch accelerate_configs/deepspeed_zero2.yaml"
            )
        return
    require_saved_zero_weights(args)
    if stage not in (2, 3):
        raise UserError(
            f"PPOTrainer does not run under ZeRO-{stage}; launch accelerate_configs/deepspeed_zero2.yaml, or ddp.yaml"
        )
    if args.value_warmup_updates:
        raise UserError(
            "under DeepSpeed, whose moments are one for policy and value, neither can stand still; set value_warmup_updates to "
            "0, or launch accelerate_configs/fsdp2.yaml"
        )
    if args.value_learning_rate is not None and configures_optimizer(args):
        raise UserError(
            "the optimizer that DeepSpeed's configuration names has one learning rate; leave it out there, or leave "
            "value_learning_rate out"
        )


def settle(trainer: Any, width: int) -> None:
    """Once there is an Accelerator: whether PPO can train under it, and what DeepSpeed wants to know. width: the policy's."""
    check_parallelism(trainer.args, trainer.accelerator.distributed_type)
    if trainer.is_deepspeed_enabled:
        fill_bucket_sizes_(trainer.accelerator, width)
        trainer.model.to(trainer.args.device)  # this, and casting, it does as training begins; it may be read before
        cast_like_engine_(trainer.model, trainer.args)
