"""One run of one trainer against the clock: held-out scores after so many seconds of training.

learning_clock.py starts it, in the environment of the trainer. Answering held-out prompts does not count as training
time. Sampling, seeds and scores of those answers are the same code for every trainer, in float32."""

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
    """What `learning_clock.prepare` saved: the policy, a reward model (one label, variance 1), prompts and settings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.settings = folder, json.loads((folder / "settings.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
        self.eos = self.tokenizer.eos_token_id
        self.train, self.test = (json.loads((folder / f"{name}.json").read_text()) for name in ("train", "test"))

    def policy(self) -> Any:
        """Load the policy."""
        model = AutoModelForCausalLM.from_pretrained(self.folder / "policy", dtype=torch.float32)
        model.generation_config.eos_token_id = self.eos
        return model

    def reward_model(self) -> Any:
        """Load the reward model."""
        return AutoModelForSequenceClassification.from_pretrained(self.folder / "reward_model", dtype=torch.float32)

    def reward(self, model: Any) -> ModelReward:
        """Wrap the reward model as a reward."""
        return ModelReward(model, self.tokenizer, self.tokenizer, "reward_model")

    @property
    def response(self) -> int:
        """Longest answer in tokens."""
        return int(self.settings["response"])

    @property
    def min_new_tokens(self) -> int:
        """Tokens before a stop token may be drawn."""
        return int(self.settings["min_new_tokens"])


class Clock(TrainerCallback):
    """Counts seconds of training, measures held-out scores at intervals, and ends the process when the time is over."""

    def __init__(self, prepared: Prepared, policy: Any, options: Any) -> None:
        self.prepared, self.policy, self.options = prepared, policy, options
        self.reward_model = prepared.reward(prepared.reward_model())
        self.float32_policy = prepared.policy()  # a trainer may have put the policy itself under autocast
        self.trained, self.due, self.points = 0.0, 0.0, []  # type: ignore[var-annotated]

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.measure()
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained += time.perf_counter() - self.last
        if self.trained >= self.due or self.trained >= self.options.seconds:
            self.measure()
        for group in kwargs["optimizer"].param_groups:  # the learning rate falls to zero over the given time
            group["lr"] = self.options.learning_rate * max(0.0, 1 - self.trained / self.options.seconds)
        if self.trained >= self.options.seconds:
            Path(self.options.out).write_text(json.dumps(self.points))
            os._exit(0)
        self.last = time.perf_counter()

    def measure(self) -> None:
        """Answer the held-out prompts, score the answers, and add a point."""
        rows = self.prepared.test
        ids = [row["input_ids"] for row in rows]
        sampling = Sampling(
            self.prepared.response,
            TEMPERATURE,
            min_new_tokens=self.prepared.min_new_tokens,
            stop_ids=(self.prepared.eos,),
        )
        self.float32_policy.load_state_dict(self.policy.state_dict())
        answers = sample(self.float32_policy, ids, sampling, [row_seed(99, row) for row in range(len(rows))])
        texts = answers.texts(self.prepared.tokenizer, ids)
        scores = self.reward_model.score_ids([[*one, *two] for one, two in zip(ids, answers.ids, strict=True)])
        point = {
            "seconds": self.trained,
            "reward_model": sum(scores) / len(scores),
            "length": mean(map(len, answers.ids)),
        }
        if self.prepared.settings["world"] == "quickstart":
            from rlhf_recipes.quickstart import gold_score

            prompts = [row["prompt"] for row in rows]
            point["score"] = mean(gold_score(prompts, texts, answer=[row["answer"] for row in rows]))
        else:  # the reward model's probability of a positive text, from its unscaled log-odds
            log_odds = torch.tensor(scores) * self.prepared.settings["deviation"]
            point["score"] = mean(torch.sigmoid(log_odds).tolist())
        self.points.append(point)
        self.due = self.trained + self.options.every
        print(json.dumps(point), flush=True)


def mean(values: Any) -> float:
    """Return the mean of any iterable."""
    values = list(values)
    return sum(values) / len(values)


def ppo_arguments(prepared: Prepared, options: Any, folder: str) -> dict[str, Any]:
    """Return the arguments that both PPO trainers get."""
    settings = prepared.settings
    return {
        "output_dir": folder, "per_device_train_batch_size": settings["batch"], "num_ppo_epochs": 4,
        "num_mini_batches": 2, "learning_rate": options.learning_rate, "kl_coef": KL,
        "response_length": prepared.response, "temperature": TEMPERATURE, "missing_eos_penalty": settings["penalty"],
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 100_000,
        "seed": options.seed, "use_cpu": True, "lr_scheduler_type": "constant",
    }  # fmt: skip


def minimum_length(prepared: Prepared) -> dict[str, Any]:
    """Return the trainer argument for `min_new_tokens`, if there is a minimum."""
    least = prepared.min_new_tokens
    return {"generation_kwargs": {"min_new_tokens": least}} if least else {}


def ours(prepared: Prepared, options: Any, folder: str) -> None:
    """Train with our PPOTrainer."""
    from rlhf_recipes import PPOConfig, PPOTrainer
    from rlhf_recipes.system import choose_precision, configure_cpu_runtime_

    policy = prepared.policy()
    frozen = {"num_layers_unfrozen": prepared.settings["upper"]} if options.upper else {}
    args = PPOConfig(
        **ppo_arguments(prepared, options, folder), **minimum_length(prepared), **frozen, max_steps=1_000_000,
        hints=False, log_completions=False,
    )  # fmt: skip
    args = choose_precision(args, policy.config.hidden_size)
    configure_cpu_runtime_(args, policy.config.hidden_size)
    PPOTrainer(
        policy, [prepared.reward_model()], args,
        Dataset.from_list([{"input_ids": row["input_ids"]} for row in prepared.train]), None, prepared.tokenizer,
        callbacks=[Clock(prepared, policy, options)],
    ).train()  # fmt: skip


def trl_ppo(prepared: Prepared, options: Any, folder: str) -> None:
    """Train with TRL 1.12's PPOTrainer."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if options.autocast:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` does; TRL's flag has no effect
    policy = prepared.policy()
    args = PPOConfig(
        **ppo_arguments(prepared, options, folder), total_episodes=10_000_000, num_sample_generations=0, bf16=False,
        stop_token="eos" if not prepared.min_new_tokens else None,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in prepared.train])
    PPOTrainer(
        args=args, processing_class=prepared.tokenizer, model=policy, ref_model=prepared.policy(),
        reward_model=prepared.reward_model(), value_model=prepared.reward_model(), train_dataset=rows,
        eval_dataset=rows.select(range(8)), callbacks=[Clock(prepared, policy, options)],
    ).train()  # fmt: skip


def grouped(prepared: Prepared, options: Any, folder: str) -> None:
    """Train with RLOO or GRPO of the installed TRL: four answers per prompt, as many optimizer steps per batch as PPO."""
    import trl

    from rlhf_recipes import PPOConfig
    from rlhf_recipes.models import count_positions_from_mask_
    from rlhf_recipes.system import choose_precision, configure_cpu_runtime_

    policy, reward_model = prepared.policy(), prepared.reward(prepared.reward_model())
    settings, penalty = prepared.settings, prepared.settings["penalty"] or 0

    def reward(completion_ids: Any, input_ids: Any, **columns: Any) -> list[float]:
        scores = reward_model.score_ids([[*one, *two] for one, two in zip(input_ids, completion_ids, strict=True)])
        finished = [bool(ids) and ids[-1] == prepared.eos for ids in completion_ids]
        return [score - (0 if ended else penalty) for score, ended in zip(scores, finished, strict=True)]

    classes = {"rloo": (trl.RLOOConfig, trl.RLOOTrainer), "grpo": (trl.GRPOConfig, trl.GRPOTrainer)}
    config_class, trainer_class = classes[options.algorithm]
    # In the precision that ours has on this machine, which is TRL's default, too.
    fitted = choose_precision(PPOConfig(folder, use_cpu=True, report_to="none"), policy.config.hidden_size)
    configure_cpu_runtime_(fitted, policy.config.hidden_size)
    args = config_class(
        output_dir=folder, per_device_train_batch_size=settings["batch"] // 2, steps_per_generation=2,
        num_iterations=4, num_generations=4, learning_rate=options.learning_rate, beta=KL, temperature=TEMPERATURE,
        max_steps=1_000_000, max_completion_length=prepared.response, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_steps=100_000, seed=options.seed, use_cpu=True, bf16=fitted.bf16,
        gradient_checkpointing=False, lr_scheduler_type="constant", disable_dropout=True, **minimum_length(prepared),
    )  # fmt: skip
    rows = [{"prompt": row["prompt"], "input_ids": row["input_ids"]} for row in prepared.train]
    trainer = trainer_class(
        model=policy, reward_funcs=[reward], args=args, train_dataset=Dataset.from_list(rows),
        processing_class=prepared.tokenizer, callbacks=[Clock(prepared, policy, options)],
    )  # fmt: skip
    for model in (trainer.model, trainer.ref_model):
        count_positions_from_mask_(model)  # otherwise padding shifts the positions of GPT-2
    trainer.train()


def main() -> None:
    """Run one trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithm", choices=["ours", "trl_ppo", "rloo", "grpo"])
    parser.add_argument("folder", type=Path, help="what learning_clock.py prepared")
    parser.add_argument("out", help="file for the points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120, help="training time")
    parser.add_argument("--every", type=float, default=8, help="seconds of training between measurements")
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--upper", action="store_true", help="train the upper layers only")
    parser.add_argument("--autocast", action="store_true", help="trl_ppo: in bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepared = Prepared(options.folder)
    train = {"ours": ours, "trl_ppo": trl_ppo}.get(options.algorithm, grouped)
    with tempfile.TemporaryDirectory() as folder:
        train(prepared, options, str(Path(folder) / "out"))


if __name__ == "__main__":
    main()
