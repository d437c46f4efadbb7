"""A worker that runs PPO updates, with TRL 1.12's trainer or ours, on the same random models and prompts.

ppo_speed.py, growth.py and others start it, in the environment of the trainer it runs. The models are transformers'
GPT-2."""

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
from peers import peak_mib, work_on_request
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
    """Return a tokenizer with the words w0, w1, ...; the text of a token does not matter here."""
    words = {f"w{index}": index for index in range(vocabulary - 2)}
    core = Tokenizer(models.WordLevel(words | {"<pad>": vocabulary - 2, "<eos>": vocabulary - 1}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def model_of(model_class: Any, options: Any, seed: int) -> Any:
    """Return a model of the requested shape with random weights."""
    width, layers, heads, vocabulary = shape_of(options)
    torch.manual_seed(seed)
    return model_class(
        GPT2Config(
            vocab_size=vocabulary, n_positions=options.prompt + options.response, n_embd=width, n_layer=layers,
            n_head=heads, num_labels=1, bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 2,
        )
    )  # fmt: skip


def shape_of(options: Any) -> tuple[int, ...]:
    """Return width, layers, heads and vocabulary of ``--shape``."""
    return tuple(json.loads(options.shape) if options.shape.startswith("[") else SHAPES[options.shape])


def prompts_of(options: Any, count: int = 512) -> Dataset:
    """Return prompts of 8 to `options.prompt` random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(min(8, options.prompt), options.prompt + 1, (count,), generator=generator).tolist()
    vocabulary = shape_of(options)[3]
    rows = [torch.randint(0, vocabulary - 2, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_list([{"input_ids": row} for row in rows])


class Turns(TrainerCallback):
    """Pauses training after every `steps` optimizer steps until the next request, and reports what they took."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps, self.device, self.imports_mib = steps, device, peak_mib()
        self.report: Any = None

    def begin(self) -> None:
        self.started = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.report = work_on_request(self.begin)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.started
        phases = dict(getattr(self, "phases", dict)())
        self.report({"seconds": seconds, "peak": peak_mib(), "above_imports": peak_mib() - self.imports_mib} | phases)


def arguments_of(options: Any, folder: str) -> dict[str, Any]:
    """Return the arguments that both trainers get."""
    return {
        "output_dir": folder, "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulation, "response_length": options.response, "num_ppo_epochs": 4,
        "num_mini_batches": 1, "learning_rate": 3e-6, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "seed": 0, "logging_steps": 10_000, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def theirs(options: Any, folder: str, turns: Turns) -> Any:
    """Build TRL's trainer."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    if options.bf16 == "true":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` does; TRL's flag has no effect
    updates = 1000 * options.batch * options.accumulation
    args = PPOConfig(
        **arguments_of(options, folder), bf16=False, num_sample_generations=0, total_episodes=updates,
        local_rollout_forward_batch_size=max(64, options.batch * options.accumulation),
    )  # fmt: skip
    rows = prompts_of(options)
    return PPOTrainer(
        args=args, processing_class=tokenizer_of(shape_of(options)[3]), model=model_of(GPT2LMHeadModel, options, 0),
        ref_model=model_of(GPT2LMHeadModel, options, 0),
        reward_model=model_of(GPT2ForSequenceClassification, options, 1),
        value_model=model_of(GPT2ForSequenceClassification, options, 2), train_dataset=rows,
        eval_dataset=rows.select(range(8)), callbacks=[turns],
    )  # fmt: skip


def ours(options: Any, folder: str, turns: Turns) -> Any:
    """Build our trainer; `turns` also reports the time of each phase and the number of tokens."""
    from rlhf_recipes import PPOConfig, PPOTrainer
    from rlhf_recipes.system import choose_precision, configure_cpu_runtime_

    precision = {} if options.bf16 == "unset" else {"bf16": options.bf16 == "true"}
    args = PPOConfig(
        **arguments_of(options, folder), **precision, max_steps=4000, hints=False, log_completions=False,
        num_layers_unfrozen=options.unfrozen, value_adapter=options.value == "adapter",
        stop_token_id=-1,  # no stop token, as in TRL without stop_token
    )  # fmt: skip
    args = choose_precision(args, shape_of(options)[0])
    configure_cpu_runtime_(args, shape_of(options)[0])
    if options.threads:
        torch.set_num_threads(options.threads)
    extra: dict[str, Any] = {}
    policy, reward_model = model_of(GPT2LMHeadModel, options, 0), model_of(GPT2ForSequenceClassification, options, 1)
    if options.value == "model":
        extra["value_model"] = model_of(GPT2ForSequenceClassification, options, 2)
    if options.lora:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=8, fan_in_fan_out=True)  # peft adapts c_attn
        if args.bf16:
            policy = policy.to(torch.bfloat16)
    trainer = PPOTrainer(
        policy, [reward_model], args, prompts_of(options), None, tokenizer_of(shape_of(options)[3]), **extra
    )
    trainer.add_callback(turns)  # after the trainer's callbacks, which end the update and its timer
    counts: dict[str, float] = {}
    rollout_of = trainer.collector.build_rollout

    def counted(*args: Any, **kwargs: Any) -> Any:
        rollout = rollout_of(*args, **kwargs)
        counts.update(tokens=int(rollout.attention_mask.sum()), answers=int(rollout.response_mask.sum()))
        return rollout

    trainer.collector.build_rollout = counted  # type: ignore[method-assign]
    turns.phases = lambda: phases_of(trainer) | counts | {"bf16": args.bf16}  # type: ignore[attr-defined]
    return trainer


def phases_of(trainer: Any) -> dict[str, float]:
    """Return the seconds of each phase of the last update, and the mean length of its answers."""
    names = ("time/generate", "time/score", "time/forward", "time/update", "completions/mean_length")
    metrics = trainer.update_metrics.drain()
    return {name: metrics[name] for name in names if name in metrics}


def main() -> None:
    """Run updates on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "theirs"])
    parser.add_argument("--shape", default="14M", help="a name, or [width, layers, heads, vocabulary]")
    parser.add_argument("--prompt", type=int, default=48, help="longest prompt in tokens")
    parser.add_argument("--response", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--batch", type=int, default=32, help="episodes of a forward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes of an update")
    parser.add_argument("--bf16", choices=["true", "false", "unset"], default="false")
    parser.add_argument("--value", choices=["model", "head", "adapter"], default="model")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter")
    parser.add_argument("--unfrozen", type=int, help="train only so many upper layers")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Imported before `Turns` reads the peak memory of the imports.
    importlib.import_module("trl.experimental.ppo" if options.side == "theirs" else "rlhf_recipes.ppo.trainer")
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        turns = Turns(1 if options.side == "theirs" else 4, device)
        trainer = {"ours": ours, "theirs": theirs}[options.side](options, str(Path(folder) / "out"), turns)
        trainer.train()


if __name__ == "__main__":
    sys.exit(main())
