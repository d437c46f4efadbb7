"""Trains small policies by PPO, alone or as one of several processes, and leaves their weights: run by torchrun.

train_ppo_ddp.py FOLDER EPISODES     a policy in FOLDER/policy, so many episodes of each process an update
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.trainer import PPOTrainer


class Spoilt(PPOTrainer):
    """The last process has a loss that is not finite in the second optimizer step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        here = self.args.process_index == self.args.world_size - 1 and self.state.global_step == 1
        return loss * torch.nan if here else loss


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token < 128 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def train(folder: Path, name: str, episodes: int, kind: type[PPOTrainer] = PPOTrainer, **options: Any) -> PPOTrainer:
    """One run; it saves in the middle and at the end, into FOLDER/NAME-by-PROCESSES."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    separate, lora = options.pop("separate", False), options.pop("lora", False)
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    # A bias of attention keys has no gradient but rounding, which Adam would blow up to whole steps.
    args = PPOConfig(
        adam_epsilon=1e-6,
        output_dir=str(folder / f"{name}-by-{processes}"), per_device_train_batch_size=episodes // 2,
        gradient_accumulation_steps=2, response_length=6, num_ppo_epochs=2, learning_rate=1e-3, logging_steps=1,
        report_to="none", disable_tqdm=True, save_steps=4, use_cpu=True, num_train_epochs=1, **options,
    )  # fmt: skip
    trainer = kind(
        str(folder / "policy"),
        [low_share, str(folder / "reward_model")],
        args,
        [{"prompt": "word " * (row % 3) + str(row)} for row in range(20)],
        value_model=reward_model if separate else None,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        if lora
        else None,
    )
    trainer.collector.max_tokens = trainer.pieces.max_tokens = 24  # tokens: a micro-batch comes in pieces, of another number in each process
    trainer.train()
    trainer.save_model()
    if trainer.args.should_save:
        (folder / f"{name}-by-{processes}" / "log.json").write_text(json.dumps(trainer.state.log_history))
    return trainer


def equal_everywhere(trainer: PPOTrainer) -> bool:
    """Whether every process ended with the very same weights."""
    mine = torch.cat([tensor.detach().double().flatten() for tensor in trainer.model.parameters()])
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    return all(torch.equal(mine, other) for other in everyone)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"whiten_rewards": True, "missing_eos_penalty": 1.0},
    "value-model": {"separate": True, "vf_coef": 1.0},
    "lora": {"lora": True, "use_score_scaling": True, "value_warmup_updates": 1, "target_kl": 0.05},
    "spoilt": {"kind": Spoilt, "num_mini_batches": 4},
}


def main(folder: Path, episodes: int) -> None:
    torch.set_num_threads(1)
    equal = {name: equal_everywhere(train(folder, name, episodes, **options)) for name, options in CASES.items()}
    if torch.distributed.get_rank() == 0:
        (folder / "equal.json").write_text(json.dumps(equal))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
