"""Which ways of running on several devices PPO supports, and what DeepSpeed needs to know."""

from typing import Any

from torch import nn

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.system import (
    cast_like_engine_,
    configures_optimizer,
    fill_bucket_sizes_,
    require_saved_zero_weights,
    zero_stage,
)


def check_parallelism(args: PPOConfig, distributed_type: Any) -> None:
    """Check that PPO can train the way it was launched. distributed_type: the `DistributedType`, or None while unknown.

    Raises:
        UserError: Megatron, whose weights a rollout cannot gather; DataParallel, which trains in another precision than it
            samples; DeepSpeed without ZeRO-2 or ZeRO-3, with an option it does not support, or that would save no weights.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs; launch one process for each with accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    if str(distributed_type).endswith("MEGATRON_LM"):
        raise UserError(
            "PPOTrainer does not run under Megatron, which cannot gather its weights for generation; launch "
            "accelerate_configs/fsdp2.yaml, deepspeed_zero3.yaml or ddp.yaml"
        )
    stage = zero_stage(args)
    if stage is None:
        if str(distributed_type).endswith("DEEPSPEED"):
            raise UserError(
                "DeepSpeed is on in an Accelerator that PPOConfig does not know; pass its configuration as deepspeed, or "
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
            "DeepSpeed has one set of moments for policy and value, so the policy cannot be frozen first; set "
            "value_warmup_updates to 0, or launch accelerate_configs/fsdp2.yaml"
        )
    if args.value_learning_rate is not None and configures_optimizer(args):
        raise UserError(
            "the optimizer in DeepSpeed's configuration has one learning rate; remove it there, or leave "
            "value_learning_rate out"
        )


def prepare_distributed_(model: nn.Module, accelerator: Any, args: PPOConfig, hidden_size: int) -> None:
    """Check the accelerator's way of running. Under DeepSpeed, set its bucket sizes and bring the model to its precision.

    The engine would do the latter when training begins, but the model is run before. hidden_size: the policy's.
    """
    check_parallelism(args, accelerator.distributed_type)
    if zero_stage(args) is None:
        return
    fill_bucket_sizes_(accelerator, hidden_size)
    model.to(args.device)
    cast_like_engine_(model, args)
