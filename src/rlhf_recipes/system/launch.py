"""Check that a run is launched as configured, because Accelerate falls back to a smaller setup without a warning."""

import json
import os
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import is_distributed_launch, world_size


def check_launch(training: Any) -> None:
    """Refuse a launch that started less than its configuration requests.

    Raises:
        UserError: the launch requests several processes and started one; or FSDP on a CPU, where Accelerate has none;
            or a ZeRO-3 that saves no weights. The message says which line to change.
    """
    require_saved_zero_weights(training)
    # For several processes `accelerate launch` sets the master address; what starts them sets the world size.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and not is_distributed_launch():
        raise UserError(
            "the launch requests several processes but started one, as accelerate does for `--cpu --num_processes N` "
            "and for `distributed_type: MULTI_CPU`; write `distributed_type: MULTI_GPU` with `use_cpu: true` in the "
            "configuration (accelerate_configs/two_cpu_processes.yaml), or launch with torchrun --nproc-per-node N; "
            "for one process, unset MASTER_ADDR"
        )
    if is_on("ACCELERATE_USE_FSDP") and training.use_cpu:
        raise UserError(
            "the launch requests FSDP, but on a CPU Accelerate would run plain data parallelism; write "
            "`distributed_type: MULTI_GPU` in the configuration, or leave out `use_cpu` on a machine with a GPU"
        )
    if training.world_size != world_size():
        raise UserError(
            f"the launch started {world_size()} processes, but each would train alone; pass --use_cpu true on a "
            "machine without a GPU, or give each process one GPU (num_processes in the configuration)"
        )


def zero_stage(training: Any) -> int | None:
    """Return the ZeRO stage of training arguments that use DeepSpeed; None without DeepSpeed."""
    return None if _deepspeed_config(training) is None else int(_zero_config(training).get("stage", 0))


def require_saved_zero_weights(training: Any) -> None:
    """Refuse a ZeRO-3 configuration that would save no weights; Trainer would only warn and save the engine's state.

    Raises:
        UserError: the message names the line to add.
    """
    gathers = _zero_config(training).get("stage3_gather_16bit_weights_on_model_save")
    if zero_stage(training) == 3 and gathers is not True:
        raise UserError(
            "this ZeRO-3 would save no weights; write `zero3_save_16bit_model: true` in the launcher's configuration "
            "(accelerate_configs/deepspeed_zero3.yaml), or `stage3_gather_16bit_weights_on_model_save` in DeepSpeed's"
        )


def configures_optimizer(training: Any) -> bool:
    """Return whether the DeepSpeed configuration defines an optimizer."""
    return "optimizer" in (_deepspeed_config(training) or {})


def _deepspeed_config(training: Any) -> dict[str, Any] | None:
    plugin = getattr(training, "deepspeed_plugin", None)
    return None if plugin is None else plugin.deepspeed_config


def _zero_config(training: Any) -> dict[str, Any]:
    return (_deepspeed_config(training) or {}).get("zero_optimization", {})


def check_sharding(accelerator: Any) -> None:
    """Refuse a trainer that does not shard its weights although the launch requests it.

    Raises:
        UserError: the message names the requested and the actual distributed type.
    """
    actual = str(accelerator.distributed_type).rpartition(".")[2]
    for variable, requested in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if is_on(variable) and actual != requested:
            raise UserError(
                f"the launch requests {requested} but runs as {actual}; set `distributed_type` in the configuration "
                "to the type that you want (MULTI_GPU: data parallel)"
            )


def refuse_sharded_8bit() -> None:
    """Refuse to train on 8-bit weights under FSDP.

    Raises:
        UserError: the launch requests FSDP, which shards floating-point weights only.
    """
    if is_on("ACCELERATE_USE_FSDP"):
        raise UserError(
            "FSDP cannot shard 8-bit weights; launch with accelerate_configs/ddp.yaml, or use 4 bits: "
            "--load_in_4bit true --bnb_4bit_quant_storage bfloat16 --dtype bfloat16"
        )


def is_on(variable: str) -> bool:
    """Return whether an environment variable that serves as a switch of the launcher is on."""
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def require_same_world_size(checkpoint: Path, processes: int) -> None:
    """Refuse to resume a DeepSpeed checkpoint on another number of processes, since ZeRO's states are sharded.

    Raises:
        UserError: another number of processes saved the checkpoint.
    """
    progress = checkpoint / "progress_0.json"
    saved = json.loads(progress.read_text(encoding="utf-8"))["world_size"] if progress.is_file() else processes
    if saved != processes:
        raise UserError(
            f"{checkpoint} was saved by {saved} processes under DeepSpeed, whose states are sharded for that number; "
            f"launch {saved} processes"
        )
