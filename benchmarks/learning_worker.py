"""One run of one algorithm against the clock: what it has learnt after how many seconds of training.

Run by learning_clock.py, in the environment of the trainer that it is about. The clock stands still while held-out prompts
are answered; answers, seeds and scores of that are the same code for everyone, in float32.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from rlhf_recipes.generation import Sampling, row_seed, sample
from rlhf_recipes.scoring import ModelReward

TEMPERATURE, KL = 0.7, 0.1


class Prepared:
    """What `learning_clock.py prepare` left: the policy, a reward model with one label and scores of unit spread, prompts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, json.loads((folder / "told.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
        self.eos = self.tokenizer.eos_token_id
        self.train, self.test = (json.loads((folder / f"{name}.json").read_text()) for name in ("train", "test"))

    def policy(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder / "policy", dtype=torch.float32)
        model.generation_config.eos_token_id = self.eos
        return model

    def reward_model(self) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(self.folder / "reward_model", dtype=torch.float32)

    def reward(self, model: Any) -> ModelReward:
        return ModelReward(model, self.tokenizer, self.tokenizer, "reward_model")

    @property
    def response(self) -> int:
        return int(self.told["response"])

    @property
    def least(self) -> int:
        return int(self.told["least"])  # tokens before a stop token may come


class Clock(TrainerCallback):
    """Counts seconds of training, measures every so many, and ends the process when they are over."""

    def __init__(self, prepared: Prepared, policy: Any, asked: Any) -> None:
        self.prepared, self.policy, self.asked = prepared, policy, asked
        self.reward_model = prepared.reward(prepared.reward_model())
        self.answering = prepared.policy()  # a trainer may have put the policy itself under autocast
        self.trained, self.due, self.points = 0.0, 0.0, []  # type: ignore[var-annotated]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.look()
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained += time.perf_counter() - self.last
        if self.trained >= self.due or self.trained >= self.asked.seconds:
            self.look()
        for group in kwargs["optimizer"].param_groups:  # the rate falls to nothing over the time there is
            group["lr"] = self.asked.learning_rate * max(0.0, 1 - self.trained / self.asked.seconds)
        if self.trained >= self.asked.seconds:
            Path(self.asked.out).write_text(json.dumps(self.points))
            os._exit(0)
        self.last = time.perf_counter()

    def look(self) -> None:
        rows = self.prepared.test
        ids = [row["input_ids"] for row in rows]
        sampling = Sampling(
            self.prepared.response, TEMPERATURE, min_new_tokens=self.prepared.least, stop_ids=(self.prepared.eos,)
        )
        self.answering.load_state_dict(self.policy.state_dict())
        answers = sample(self.answering, ids, sampling, [row_seed(99, row) for row in range(len(rows))])
        texts = answers.texts(self.prepared.tokenizer)
        scores = self.reward_model.score_ids([[*one, *two] for one, two in zip(ids, answers.ids, strict=True)])
        point = {
            "seconds": self.trained,
            "reward_model": sum(scores) / len(scores),
            "length": mean(map(len, answers.ids)),
        }
        if self.prepared.told["world"] == "quickstart":
            from rlhf_recipes.quickstart import gold_score

            asked = [row["prompt"] for row in rows]
            point["score"] = mean(gold_score(asked, texts, answer=[row["answer"] for row in rows]))
        else:  # the reward model's own probability of a positive text
            spread, shift = self.prepared.told["spread"], self.prepared.told["shift"]
            point["score"] = mean(torch.sigmoid(torch.tensor(scores) * spread + shift).tolist())
        self.points.append(point)
        self.due = self.trained + self.asked.every
        print(json.dumps(point), flush=True)


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def ppo_arguments(prepared: Prepared, asked: Any, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": prepared.told["batch"], "num_ppo_epochs": 4,
        "num_mini_batches": 2, "learning_rate": asked.learning_rate, "kl_coef": KL, "response_length": prepared.response,
        "temperature": TEMPERATURE, "missing_eos_penalty": prepared.told["penalty"], "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100_000, "seed": asked.seed, "use_cpu": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip


def ours(prepared: Prepared, asked: Any, folder: str) -> None:
    from rlhf_recipes import PPOConfig, PPOTrainer
    from rlhf_recipes.system import choose_precision, configure_cpu_runtime_

    policy = prepared.policy()
    least = {"generation_kwargs": {"min_new_tokens": prepared.least}} if prepared.least else {}
    frugal = {"num_layers_unfrozen": prepared.told["upper"]} if asked.upper else {}
    args = PPOConfig(
        **ppo_arguments(prepared, asked, folder), **least, **frugal, max_steps=1_000_000, hints=False,
        log_completions=False,
    )  # fmt: skip
    args = choose_precision(args, policy.config.hidden_size)
    configure_cpu_runtime_(args, policy.config.hidden_size)
    PPOTrainer(
        policy, [prepared.reward_model()], args,
        Dataset.from_list([{"input_ids": row["input_ids"]} for row in prepared.train]), None, prepared.tokenizer,
        callbacks=[Clock(prepared, policy, asked)],
    ).train()  # fmt: skip


def trl_ppo(prepared: Prepared, asked: Any, folder: str) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if asked.autocast:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` does; its own flag changes nothing
    policy = prepared.policy()
    args = PPOConfig(
        **ppo_arguments(prepared, asked, folder), total_episodes=10_000_000, num_sample_generations=0, bf16=False,
        stop_token="eos" if not prepared.least else None,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in prepared.train])
    PPOTrainer(
        args=args, processing_class=prepared.tokenizer, model=policy, ref_model=prepared.policy(),
        reward_model=prepared.reward_model(), value_model=prepared.reward_model(), train_dataset=rows,
        eval_dataset=rows.select(range(8)), callbacks=[Clock(prepared, policy, asked)],
    ).train()  # fmt: skip


def grouped(prepared: Prepared, asked: Any, folder: str) -> None:
    """RLOO and GRPO of today's TRL, four answers to a prompt, with as many optimizer steps on each batch as PPO."""
    import trl

    from rlhf_recipes import PPOConfig
    from rlhf_recipes.models import count_positions_from_mask_
    from rlhf_recipes.system import choose_precision, configure_cpu_runtime_

    policy, reward_model, told = prepared.policy(), prepared.reward(prepared.reward_model()), prepared.told

    def reward(completion_ids: Any, input_ids: Any, **columns: Any) -> list[float]:
        scores = reward_model.score_ids([[*one, *two] for one, two in zip(input_ids, completion_ids, strict=True)])
        ended = [bool(ids) and ids[-1] == prepared.eos for ids in completion_ids]
        return [score - (0 if end else told["penalty"] or 0) for score, end in zip(scores, ended, strict=True)]

    least = {"generation_kwargs": {"min_new_tokens": prepared.least}} if prepared.least else {}
    kinds = {"rloo": (trl.RLOOConfig, trl.RLOOTrainer), "grpo": (trl.GRPOConfig, trl.GRPOTrainer)}
    config, trainer = kinds[asked.algorithm]
    # In the precision that ours gets on this machine, which is TRL's default too.
    fitted = choose_precision(PPOConfig(folder, use_cpu=True, report_to="none"), policy.config.hidden_size)
    configure_cpu_runtime_(fitted, policy.config.hidden_size)
    low = fitted.bf16
    args = config(
        output_dir=folder, per_device_train_batch_size=told["batch"] // 2, steps_per_generation=2, num_iterations=4,
        num_generations=4, learning_rate=asked.learning_rate, beta=KL, temperature=TEMPERATURE, max_steps=1_000_000,
        max_completion_length=prepared.response, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_steps=100_000, seed=asked.seed, use_cpu=True, bf16=low, gradient_checkpointing=False,
        lr_scheduler_type="constant", **({"disable_dropout": True}), **least,
    )  # fmt: skip
    rows = [{"prompt": row["prompt"], "input_ids": row["input_ids"]} for row in prepared.train]
    made = trainer(
        model=policy, reward_funcs=[reward], args=args, train_dataset=Dataset.from_list(rows),
        processing_class=prepared.tokenizer, callbacks=[Clock(prepared, policy, asked)],
    )  # fmt: skip
    for reader in (made.model, made.ref_model):
        count_positions_from_mask_(reader)  # without it their probabilities are those of other positions (GPT-2)
    made.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithm", choices=["ours", "trl_ppo", "rloo", "grpo"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--every", type=float, default=8)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--upper", action="store_true", help="let only the upper layers learn")
    parser.add_argument("--autocast", action="store_true", help="trl_ppo: in bfloat16")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    prepared = Prepared(asked.folder)
    run = {"ours": ours, "trl_ppo": trl_ppo}.get(asked.algorithm, grouped)
    with tempfile.TemporaryDirectory() as folder:
        run(prepared, asked, str(Path(folder) / "out"))


if __name__ == "__main__":
    main()
