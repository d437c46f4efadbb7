"""One update of PPO at a time, by TRL 1.12's trainer or by ours, on the same random models and prompts.

Run by ppo_speed.py and growth.py, in the environment of whichever trainer it is; the models are transformers' own GPT-2.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peers import answer_when_told, peak
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

SHAPES = {  # width, layers, heads, vocabulary
    "14M": (384, 6, 6, 8192),
    "124M": (768, 12, 12, 50257),
}


def tokenizer_of(vocabulary: int) -> Any:
    """Words w0, w1, ...; what a token reads like does not matter here."""
    words = {f"w{index}": index for index in range(vocabulary - 2)}
    core = Tokenizer(models.WordLevel(words | {"<pad>": vocabulary - 2, "<eos>": vocabulary - 1}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def model_of(kind: Any, asked: Any, seed: int) -> Any:
    width, layers, heads, vocabulary = shape_of(asked)
    torch.manual_seed(seed)
    return kind(
        GPT2Config(
            vocab_size=vocabulary, n_positions=asked.prompt + asked.response, n_embd=width, n_layer=layers, n_head=heads,
            num_labels=1, bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 2,
        )
    )  # fmt: skip


def shape_of(asked: Any) -> tuple[int, ...]:
    given = json.loads(asked.shape) if asked.shape.startswith("[") else SHAPES[asked.shape]
    return tuple(given)


def prompts_of(asked: Any, count: int = 512) -> Dataset:
    """Prompts of 8 to `prompt` random tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(min(8, asked.prompt), asked.prompt + 1, (count,), generator=draw).tolist()
    rows = [torch.randint(0, shape_of(asked)[3] - 2, (length,), generator=draw).tolist() for length in lengths]
    return Dataset.from_list([{"input_ids": row} for row in rows])


class Turns(TrainerCallback):
    """Waits after each update until it is told to go on."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device, self.imported = steps, device, peak()
        self.tell: Any = None

    def begin(self) -> None:
        self.started = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.tell = answer_when_told(self.begin)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        phases = dict(getattr(self, "phases", dict)())
        self.tell({"seconds": seconds, "peak": peak(), "above_imports": peak() - self.imported} | phases)


def arguments_of(asked: Any, folder: str) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder, "per_device_train_batch_size": asked.batch, "gradient_accumulation_steps": asked.accumulation,
        "response_length": asked.response, "num_ppo_epochs": 4, "num_mini_batches": 1, "learning_rate": 3e-6,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 0, "logging_steps": 10_000,
        "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def theirs(asked: Any, folder: str, turns: Turns) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if asked.bf16 == "true":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` does; its own flag changes nothing
    updates = 1000 * asked.batch * asked.accumulation
    args = PPOConfig(
        **arguments_of(asked, folder), bf16=False, num_sample_generations=0, total_episodes=updates,
        local_rollout_forward_batch_size=max(64, asked.batch * asked.accumulation),
    )  # fmt: skip
    rows = prompts_of(asked)
    return PPOTrainer(
        args=args, processing_class=tokenizer_of(shape_of(asked)[3]), model=model_of(GPT2LMHeadModel, asked, 0),
        ref_model=model_of(GPT2LMHeadModel, asked, 0), reward_model=model_of(GPT2ForSequenceClassification, asked, 1),
        value_model=model_of(GPT2ForSequenceClassification, asked, 2), train_dataset=rows,
        eval_dataset=rows.select(range(8)), callbacks=[turns],
    )  # fmt: skip


def ours(asked: Any, folder: str, turns: Turns) -> Any:
    from rlhf_recipes import PPOConfig, PPOTrainer
    from rlhf_recipes.system import choose_precision, configure_cpu_runtime_

    chosen = {} if asked.bf16 == "unset" else {"bf16": asked.bf16 == "true"}
    args = PPOConfig(
        **arguments_of(asked, folder), **chosen, max_steps=4000, hints=False, log_completions=False,
        num_layers_unfrozen=asked.unfrozen, value_adapter=asked.value == "adapter",
        stop_token_id=-1,  # none, as TRL has it where stop_token is not set
    )  # fmt: skip
    args = choose_precision(args, shape_of(asked)[0])
    configure_cpu_runtime_(args, shape_of(asked)[0])
    if asked.threads:
        torch.set_num_threads(asked.threads)
    options: dict[str, Any] = {}
    policy, reward_model = model_of(GPT2LMHeadModel, asked, 0), model_of(GPT2ForSequenceClassification, asked, 1)
    if asked.value == "model":
        options["value_model"] = model_of(GPT2ForSequenceClassification, asked, 2)
    if asked.lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            task_type="CAUSAL_LM", r=8, fan_in_fan_out=True
        )  # on c_attn, as peft has it
        if args.bf16:
            policy = policy.to(torch.bfloat16)
    trainer = PPOTrainer(
        policy, [reward_model], args, prompts_of(asked), None, tokenizer_of(shape_of(asked)[3]), **options
    )
    trainer.add_callback(turns)  # after the trainer's own, which end the update and its clock
    told: dict[str, float] = {}
    inner = trainer.collector.rollout

    def counted(*args: Any, **kwargs: Any) -> Any:
        rollout = inner(*args, **kwargs)
        told.update(tokens=int(rollout.attention_mask.sum()), answers=int(rollout.response_mask.sum()))
        return rollout

    trainer.collector.rollout = counted  # type: ignore[method-assign]
    turns.phases = lambda: phases_of(trainer) | told | {"bf16": args.bf16}  # type: ignore[attr-defined]
    return trainer


def phases_of(trainer: Any) -> dict[str, float]:
    names = ("time/generate", "time/score", "time/forward", "time/update", "completions/mean_length")
    last = trainer.update_metrics.drain()
    return {name: last[name] for name in names if name in last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "theirs"])
    parser.add_argument("--shape", default="14M", help="a name, or [width, layers, heads, vocabulary]")
    parser.add_argument("--prompt", type=int, default=48, help="longest prompt in tokens")
    parser.add_argument("--response", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32, help="episodes of a forward pass")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--bf16", choices=["true", "false", "unset"], default="false")
    parser.add_argument("--value", choices=["model", "head", "adapter"], default="model")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--unfrozen", type=int)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    # Before the peak of the imports is read.
    importlib.import_module("trl.experimental.ppo" if asked.side == "theirs" else "rlhf_recipes.ppo.trainer")
    with tempfile.TemporaryDirectory() as folder:
        turns = Turns(1 if asked.side == "theirs" else 4, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        trainer = {"ours": ours, "theirs": theirs}[asked.side](asked, str(Path(folder) / "out"), turns)
        trainer.train()


if __name__ == "__main__":
    sys.exit(main())
