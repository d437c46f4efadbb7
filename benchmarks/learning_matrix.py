"""Does PPO improve the model in every set-up? Small runs over seeds; each cell is the score before and after training.

    python benchmarks/learning_matrix.py [--seeds 3] [--out docs/learning.md]

An untrained two-layer GPT-2 writes bytes. The reward is the share of an answer's tokens whose id is below 128: a
function, or a reward model that was trained to predict it. One CPU thread, two for the case of two processes."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.system import describe_hardware

SPECIAL = ("<|endoftext|>", "<|pad|>")
SHAPE: dict[str, Any] = {
    "vocab_size": 258, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.1,
    "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
STOPS = [*range(200, 257)]

# What each case changes in the first one; "processes" is the number of processes.
CASES: dict[str, dict[str, Any]] = {
    "full, shared value head": {},
    "full, separate value model": {"value_model": True},
    "LoRA, value adapter": {"lora": True},
    "LoRA, shared value head": {"lora": True, "value_adapter": False},
    "reward from a reward model": {"reward_model": True},
    "pad is EOS": {"pad": "<|endoftext|>"},
    "left-over generation_config": {"left_over": True},
    "two processes": {"processes": 2},
}


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Return the share of tokens with an id below 128."""
    return [sum(token < 128 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def byte_tokenizer(pad: str = "<|pad|>") -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], bos_token=SPECIAL[0], pad_token=pad)


def trained_reward_model(seed: int) -> GPT2ForSequenceClassification:
    """Train a reward model to predict the share of low tokens in answers of one to five tokens, after a low prompt."""
    torch.manual_seed(1000 + seed)
    reward_model = GPT2ForSequenceClassification(GPT2Config(**SHAPE, num_labels=1))
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=3e-3)
    for _ in range(400):
        low = torch.rand(32, int(torch.randint(1, 6, ()))) < torch.rand(32, 1)
        answers = torch.where(low, torch.randint(0, 128, low.shape), torch.randint(128, 257, low.shape))
        rows = torch.cat([torch.randint(0, 128, (32, int(torch.randint(1, 12, ())))), answers], dim=1)
        loss = ((reward_model(input_ids=rows).logits[:, 0] - low.float().mean(1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return reward_model


def run(case: str, seed: int, folder: Path) -> tuple[float, float]:
    """Train a case and return `low_share` in the first update, and its mean in the last two."""
    options = dict(CASES[case])
    processes = options.pop("processes", 1)
    torch.manual_seed(seed)
    policy = GPT2LMHeadModel(GPT2Config(**SHAPE))
    policy.generation_config.eos_token_id = STOPS
    if options.pop("left_over", False):
        policy.generation_config.update(do_sample=True, top_k=5, top_p=0.3, temperature=0.1, repetition_penalty=3.0)
    rewards: list[Any] = [low_share]
    weights = None
    if options.pop("reward_model", False):
        rewards, weights = [trained_reward_model(seed), low_share], [1.0, 0.0]
    lora = options.pop("lora", False)
    tokenizer = byte_tokenizer(options.pop("pad", "<|pad|>"))
    torch.manual_seed(seed + 10)
    value = GPT2ForSequenceClassification(GPT2Config(**SHAPE, num_labels=1)) if options.pop("value_model", 0) else None
    args = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=32 // processes, num_mini_batches=2, response_length=5,
        learning_rate=1e-2, max_steps=160, logging_steps=1, seed=seed, reward_weights=weights,
        report_to="none", disable_tqdm=True, save_strategy="no", hints=False, log_completions=False, use_cpu=True,
        **options,
    )  # fmt: skip
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True
    )
    prompts = [{"prompt": f"{'word ' * (row % 3)}{row}"} for row in range(32)]
    trainer = PPOTrainer(
        policy, rewards, args, prompts, processing_class=tokenizer, value_model=value,
        peft_config=adapter if lora else None,
    )  # fmt: skip
    trainer.train()
    scores = [entry["rewards/low_share"] for entry in trainer.state.log_history if "rewards/low_share" in entry]
    return scores[0], sum(scores[-2:]) / 2


def launched(case: str, seed: int) -> tuple[float, float]:
    """Call `run` in as many processes as the case has."""
    processes = CASES[case].get("processes", 1)
    if processes == 1:
        with tempfile.TemporaryDirectory() as folder:
            return run(case, seed, Path(folder))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(Path(__file__).resolve()), "--one", case, "--seeds", str(seed)]
    source = str(Path(__file__).resolve().parents[1] / "src")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    process = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    first, last = json.loads(process.stdout.strip().splitlines()[-1])
    return first, last


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of each case: 0, 1, ...")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case to run as one of its processes; --seeds is its seed
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            scores = run(options.one, options.seeds, Path(folder))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(scores))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return
    lines = ["| case | " + " | ".join(f"seed {seed}" for seed in range(options.seeds)) + " | failed |"]
    lines.append("|---|" + "---|" * (options.seeds + 1))
    for case in CASES:
        scores_by_seed = [launched(case, seed) for seed in range(options.seeds)]
        failed = [str(seed) for seed, (first, last) in enumerate(scores_by_seed) if last < first + 0.1]
        cells = [f"{first:.2f} to {last:.2f}" for first, last in scores_by_seed]
        lines.append(f"| {case} | " + " | ".join(cells) + f" | {', '.join(failed) or 'none'} |")
        print(lines[-1], flush=True)
    if options.out:
        command_line = "python benchmarks/learning_matrix.py"
        head = f"Measured {datetime.date.today()} on {describe_hardware()}, by `{command_line}`.\n\n"
        options.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
