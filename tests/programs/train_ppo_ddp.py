"""PPO on small policies, by one process or as one of several, which saves the weights.

train_ppo_ddp.py FOLDER EPISODES     a policy in FOLDER/policy; EPISODES per process and update; torchrun starts it
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


class NonFinite(PPOTrainer):
    """The loss of the last process is not finite in the second optimizer step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        broken = self.args.process_index == self.args.world_size - 1 and self.state.global_step == 1
        return loss * torch.nan if broken else loss


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token < 128 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def train(folder: Path, name: str, episodes: int, kind: type[PPOTrainer] = PPOTrainer, **options: Any) -> PPOTrainer:
    """Run PPO; save in the middle and at the end in FOLDER/NAME-by-PROCESSES."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    separate, lora = options.pop("separate", False), options.pop("lora", False)
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    # The bias of attention keys has a gradient of rounding errors only, which Adam would scale to full steps.
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
    trainer.collector.max_tokens = trainer.piece_runner.max_tokens = (
        24  # tokens: a micro-batch comes in pieces, of another number in each process
    )
    trainer.train()
    trainer.save_model()
    if trainer.args.should_save:
        (folder / f"{name}-by-{processes}" / "log.json").write_text(json.dumps(trainer.state.log_history))
    return trainer


def all_ranks_equal(trainer: PPOTrainer) -> bool:
    """Return whether all processes ended with the same weights."""
    weights = torch.cat([tensor.detach().double().flatten() for tensor in trainer.model.parameters()])
    gathered = [torch.empty_like(weights) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, weights)
    return all(torch.equal(weights, other) for other in gathered)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"whiten_rewards": True, "missing_eos_penalty": 1.0},
    "value-model": {"separate": True, "vf_coef": 1.0},
    "lora": {"lora": True, "use_score_scaling": True, "value_warmup_updates": 1, "target_kl": 0.05},
    "non-finite": {"kind": NonFinite, "num_mini_batches": 4},
}


def main(folder: Path, episodes: int) -> None:
    torch.set_num_threads(1)
    equal = {name: all_ranks_equal(train(folder, name, episodes, **options)) for name, options in CASES.items()}
    if torch.distributed.get_rank() == 0:
        (folder / "equal.json").write_text(json.dumps(equal))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
