"""PPO under DeepSpeed on CPU processes.

train_ppo_deepspeed.py FOLDER STAGE     policies in FOLDER/policy and FOLDER/rotary, a reward model in FOLDER/reward_model;
                                        `accelerate launch` starts it
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from rlhf_recipes.generation.sampling import row_seed
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.trainer import PPOTrainer

STEPS = 10


class NonFinite(PPOTrainer):
    """The loss of the last process is not finite in the second optimizer step."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        broken = self.args.process_index == self.args.world_size - 1 and self.state.global_step == 1
        return loss * torch.nan if broken else loss


class Manual(PPOTrainer):
    """Trains by `step` in a loop over the same prompts and seeds; the score depends on the answer."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        share = self.args.episodes_per_process
        while self.state.global_step < self.args.max_steps:
            number = self.state.global_step // self.args.steps_per_update
            first = self.args.process_index * share
            prompts = self.prompts.rows([(8 * number + first + row) % len(self.prompts) for row in range(share)])
            seeds = [row_seed(5, 8 * number + first + row) for row in range(share)]
            completions, _ = self.collector.answer(prompts, seeds, self.generate, self.score)
            scores = [sum(token < 128 for token in ids) / len(ids) for ids in completions.ids]
            self.log_of_updates.append(self.step(prompts["prompt_ids"], completions.ids, scores))

    log_of_updates: list[dict[str, float]]


CASES: dict[str, dict[str, Any]] = {
    "full": {"num_mini_batches": 2},
    "lora": {"lora": True},
    "upper": {"num_layers_unfrozen": 1},
    "value": {"value_model": True, "value_learning_rate": 3e-4, "gradient_checkpointing": True},
    "non-finite": {"kind": NonFinite, "num_mini_batches": 2},
    "above target_kl": {"target_kl": 1e-3, "num_mini_batches": 2},
    "manual": {"kind": Manual, "lr_scheduler_type": "linear"},
}
# In bfloat16 DeepSpeed also casts weights that other runs keep in float32, so no other run has the same numbers.
BF16: dict[str, dict[str, Any]] = {
    "bf16 rotary": {"bf16": True, "policy": "rotary"},
    "bf16 upper": {"bf16": True, "num_layers_unfrozen": 1},
    "bf16 manual": {"bf16": True, "kind": Manual},
}
ALL = CASES | BF16
RESUMED = [case for case, options in ALL.items() if options.get("kind") is not Manual]


def make_trainer(folder: Path, out: str, case: str, **changes: Any) -> PPOTrainer:
    options = dict(ALL[case])
    kind, lora = options.pop("kind", PPOTrainer), options.pop("lora", False)
    policy = options.pop("policy", "policy")
    value = value_model(folder) if options.pop("value_model", False) else None
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    args = PPOConfig(
        output_dir=str(folder / out), global_batch_size=8, response_length=6, num_ppo_epochs=2, learning_rate=1e-3,
        adam_epsilon=1e-6, max_steps=STEPS, logging_steps=3, save_steps=3, save_total_limit=9, report_to="none",
        disable_tqdm=True, hints=False, use_cpu=True, seed=5, eval_strategy="steps", eval_steps=5, **options, **changes,
    )  # fmt: skip
    trainer: PPOTrainer = kind(
        str(folder / policy),
        str(folder / "reward_model"),
        args,
        [{"prompt": "word " * (row % 3) + str(row)} for row in range(20)],
        [{"prompt": f"held out {row}"} for row in range(5)],
        value_model=value,
        peft_config=adapter if lora else None,
    )
    trainer.log_of_updates = []
    trainer.collector.max_tokens = trainer.piece_runner.max_tokens = (
        24  # tokens: of each micro-batch some processes make more pieces than others
    )
    return trainer


def value_model(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    from rlhf_recipes.system import deepspeed as zero

    with zero.load_unsharded():
        return AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")


def train_and_save(folder: Path, out: str, case: str, resume: str | None = None) -> PPOTrainer:
    """Evaluate, train, save the model and the log; return the trainer."""
    trainer = make_trainer(folder, out, case)
    before = trainer.evaluate() if resume is None else {}
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.args.should_save:
        log = {"before": before, "log": trainer.state.log_history, "updates": trainer.log_of_updates}
        (folder / out / "log.json").write_text(json.dumps(log))
    return trainer


def share_of(trainer: PPOTrainer) -> float:
    """Return the share of the weights of policy and value that this process holds between two passes."""
    weights: list[Any] = list(trainer.model.parameters())
    held = sum(each.ds_tensor.numel() if hasattr(each, "ds_tensor") else each.numel() for each in weights)
    whole = sum(each.numel() for each in weights if not hasattr(each, "ds_tensor"))
    return held / (whole + sum(each.ds_numel for each in weights if hasattr(each, "ds_tensor")))


def main(folder: Path, stage: int) -> None:
    torch.set_num_threads(1)
    shares = {}
    for case in ALL:
        trainer = train_and_save(folder, f"{case} zero {stage}", case)
        shares[case] = share_of(trainer)
        if trainer.args.should_save and case in RESUMED:
            checkpoint = folder / f"{case} zero {stage} resumed" / "checkpoint-3"
            shutil.copytree(folder / f"{case} zero {stage}" / "checkpoint-3", checkpoint)
        torch.distributed.barrier()
        if case in RESUMED:
            train_and_save(folder, f"{case} zero {stage} resumed", case, resume="auto")  # from the middle of an update
    if os.environ["RANK"] == "0":
        (folder / f"shares {stage}.json").write_text(json.dumps(shares))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
