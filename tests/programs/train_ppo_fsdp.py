"""PPO on weights that FSDP2 shards over CPU processes.

train_ppo_fsdp.py FOLDER     a policy in FOLDER/policy and a reward model in FOLDER/reward_model; torchrun starts it
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from rlhf_recipes.core.unwrapping import trunk_of
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.trainer import PPOTrainer

STEPS = 10
CASES: dict[str, dict[str, Any]] = {
    "full": {"num_mini_batches": 2},
    "lora": {"lora": True},
    "upper": {"num_layers_unfrozen": 1, "lora": False},
}


class Sharded(PPOTrainer):
    """Shards like FSDP2 under Accelerate: each layer alone, and the remaining weights with the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.world_size > 1:
            mesh = init_device_mesh("cpu", (self.args.world_size,))
            for layer in trunk_of(self.model.policy).h:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            self.is_distributed_loading_by_transformers = True  # so that Accelerate does not wrap it again


def make_trainer(folder: Path, out: str, case: str, **changes: Any) -> PPOTrainer:
    options = dict(CASES[case])
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    args = PPOConfig(
        output_dir=str(folder / out), global_batch_size=8, response_length=6, num_ppo_epochs=2, learning_rate=1e-3,
        adam_epsilon=1e-6, max_steps=STEPS, logging_steps=3, save_steps=3, save_total_limit=9, report_to="none",
        disable_tqdm=True, hints=False, use_cpu=True, seed=5, eval_strategy="steps", eval_steps=5,
        **{name: value for name, value in options.items() if name != "lora"}, **changes,
    )  # fmt: skip
    trainer = Sharded(
        str(folder / "policy"),
        str(folder / "reward_model"),
        args,
        [{"prompt": "word " * (row % 3) + str(row)} for row in range(20)],
        [{"prompt": f"held out {row}"} for row in range(5)],
        peft_config=adapter if options.get("lora") else None,
    )
    trainer.collector.max_tokens = trainer.piece_runner.max_tokens = (
        24  # tokens: of each micro-batch some processes make more pieces than others
    )
    return trainer


def shares(trainer: PPOTrainer) -> dict[str, float]:
    """Return the share of weights and of optimizer moments that this process holds, and the number of sharded layers."""
    weights = [each for each in trainer.model.parameters() if isinstance(each, DTensor)]
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    sharded = {"weights": weights, "moments": moments}
    return {
        name: sum(each.to_local().numel() for each in tensors) / sum(each.numel() for each in tensors)
        for name, tensors in sharded.items()
    } | {"layers": sum(isinstance(module, FSDPModule) for module in trainer.model.modules())}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    held = {}
    for case in CASES:
        trainer = make_trainer(folder, f"{case} sharded", case)
        trainer.train()
        trainer.save_model()
        held[case] = shares(trainer)
        if trainer.args.should_save:
            (folder / f"{case} sharded" / "log.json").write_text(json.dumps(trainer.state.log_history))
            shutil.copytree(folder / f"{case} sharded" / "checkpoint-3", folder / f"{case} resumed" / "checkpoint-3")
        torch.distributed.barrier()
        resumed = make_trainer(folder, f"{case} resumed", case)  # from the middle of an update
        resumed.train(resume_from_checkpoint="auto")
        resumed.save_model()
    if os.environ["RANK"] == "0":
        (folder / "shares.json").write_text(json.dumps(held))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
