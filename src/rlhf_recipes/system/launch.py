"""Whether a run is launched as it was asked: Accelerate falls back to less without a word."""

import json
import os
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import UserError


def check_launch(training: Any) -> None:
    """Refuse a launch that became less than it asked for.

    Raises:
        UserError: several processes were asked for and one was started, or FSDP where Accelerate has none, or ZeRO-3 that
            saves no weights; says which line to change.
    """
    require_saved_zero_weights(training)
    asked = os.environ
    # `accelerate launch` names an address for several processes, and who starts them says how many there are.
    if "ACCELERATE_MIXED_PRECISION" in asked and "MASTER_ADDR" in asked and "WORLD_SIZE" not in asked:
        raise UserError(
            "the launch asks for several processes and started one, as accelerate does for `--cpu --num_processes N` and "
            "for `distributed_type: MULTI_CPU`; write `distributed_type: MULTI_GPU` with `use_cpu: true` in the "
            "configuration (accelerate_configs/two_cpu_processes.yaml), or launch with torchrun --nproc-per-node N; if "
            "one process is meant, unset MASTER_ADDR"
        )
    if is_on("ACCELERATE_USE_FSDP") and training.use_cpu:
        raise UserError(
            "the launch asks for FSDP, but Accelerate has it on no CPU and would run plain data parallelism; write "
            "`distributed_type: MULTI_GPU` in the configuration, or leave out `use_cpu` where there is a GPU"
        )
    if training.world_size != int(asked.get("WORLD_SIZE", "1")):
        raise UserError(
            f"the launch started {asked['WORLD_SIZE']} processes, but each would train by itself; pass --use_cpu true on a "
            "machine without a GPU, or give each process a GPU of its own (num_processes in the configuration)"
        )


def zero_stage(training: Any) -> int | None:
    """Of `TrainingArguments` that are to train under DeepSpeed, the stage of ZeRO; None elsewhere."""
    return None if _deepspeed(training) is None else int(_zero(training).get("stage", 0))


def require_saved_zero_weights(training: Any) -> None:
    """Refuse a ZeRO-3 that would end a run without weights: Trainer then warns, and leaves the engine's own states.

    Raises:
        UserError: names the line to add.
    """
    if zero_stage(training) == 3 and _zero(training).get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise UserError(
            "this ZeRO-3 would save no weights; write `zero3_save_16bit_model: true` in the launcher's configuration "
            "(accelerate_configs/deepspeed_zero3.yaml), or `stage3_gather_16bit_weights_on_model_save` in DeepSpeed's"
        )


def configures_optimizer(training: Any) -> bool:
    """Whether DeepSpeed's configuration brings an optimizer of its own."""
    return "optimizer" in (_deepspeed(training) or {})


def _deepspeed(training: Any) -> dict[str, Any] | None:
    plugin = getattr(training, "deepspeed_plugin", None)
    return None if plugin is None else plugin.deepspeed_config


def _zero(training: Any) -> dict[str, Any]:
    return (_deepspeed(training) or {}).get("zero_optimization", {})


def check_sharding(accelerator: Any) -> None:
    """Refuse a trainer that does not shard its weights where the launch asked for it.

    Raises:
        UserError: names what was asked and what there is.
    """
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    for name, wanted in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if is_on(name) and kind != wanted:
            raise UserError(
                f"the launch asks for {wanted} and runs as {kind}; change `distributed_type` in the configuration to "
                "what is meant (MULTI_GPU: data parallel)"
            )


def refuse_sharded_8bit() -> None:
    """Of a model that is to train on weights in 8 bits.

    Raises:
        UserError: the launch asks for FSDP, which cuts floating-point numbers apart.
    """
    if is_on("ACCELERATE_USE_FSDP"):
        raise UserError(
            "FSDP cannot cut weights in 8 bits apart; launch accelerate_configs/ddp.yaml, or read them in 4: --load_in_4bit "
            "true --bnb_4bit_quant_storage bfloat16 --dtype bfloat16"
        )


def is_on(name: str) -> bool:
    """Whether a switch of the launcher, an environment variable, is set."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def require_same_world_size(checkpoint: Path, processes: int) -> None:
    """ZeRO's states are cut for as many processes as saved them.

    Raises:
        UserError: there were more or fewer.
    """
    told = checkpoint / "progress_0.json"
    saved = json.loads(told.read_text(encoding="utf-8"))["processes"] if told.is_file() else processes
    if saved != processes:
        raise UserError(
            f"{checkpoint} was saved by {saved} processes under DeepSpeed, whose states are cut for so many; launch {saved}"
        )
