"""Peak memory of PPO with four separate models and with one base for all roles, each in a process of its own.

    python benchmarks/memory.py [--size gpt2] [--out docs/memory.md]

Two updates of eight episodes of 32 tokens on a randomly initialised model, in float32 on a CPU, in bfloat16 on a GPU. What is
told is the peak of the resident set above what the imports take, on a GPU of its allocated memory; and the weights that are
held, each counted once.
"""

import argparse
import datetime
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from learning_matrix import byte_tokenizer
from peers import peak_mib
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.models import build_gpt2, save_reward_model_config
from rlhf_recipes.system import describe_hardware

TARGETS = ["c_attn", "c_proj", "c_fc"]
CASES = {
    "four models, all weights trained": "policy and value model trained, a frozen copy as reference, a reward model",
    "four models, LoRA on the policy": "adapter on the policy, value model, reference and reward model of their own",
    "one base, four roles": "adapters for policy, value and reward model on one base; the reference is the base",
    "one base in 4 bits, four roles": "the same on an NF4 base",
}


def lora(task: str, **options: Any) -> LoraConfig:
    return LoraConfig(task_type=task, r=8, target_modules=TARGETS, fan_in_fan_out=True, **options)


def leave_models(folder: Path, size: str) -> None:
    """A base, a reward model of its own, and the same reward model as an adapter on the base."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    build_gpt2(size, tokenizer, positions=128).save_pretrained(folder / "base")
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    reward_model.config.pad_token_id = tokenizer.pad_token_id
    reward_model.save_pretrained(folder / "reward_model")
    adapted = get_peft_model(reward_model, lora("SEQ_CLS", modules_to_save=["score"]))
    adapted.save_pretrained(folder / "reward_model_adapter")
    save_reward_model_config(adapted, folder / "reward_model_adapter")
    for name in ("base", "reward_model", "reward_model_adapter"):
        tokenizer.save_pretrained(folder / name)


def run(case: str, folder: Path, episodes: int, response: int) -> dict[str, float]:
    torch.set_num_threads(1)
    gc.collect()
    before, gpu = peak_mib(), torch.cuda.is_available()
    one_base, four_bits = case.startswith("one base"), "4 bits" in case
    base, reward_model = str(folder / "base"), str(folder / ("reward_model_adapter" if one_base else "reward_model"))
    options: dict[str, Any] = {}
    if not one_base:
        options["value_model"] = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        options["ref_model"] = AutoModelForCausalLM.from_pretrained(base)
    if "all weights" not in case:
        options["peft_config"] = lora("CAUSAL_LM")
    if four_bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
        )  # fmt: skip
    args = PPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=episodes, response_length=response, num_ppo_epochs=1,
        max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no", hints=False, use_cpu=not gpu, bf16=gpu,
        log_completions=False,
    )  # fmt: skip
    trainer = PPOTrainer(
        base, [reward_model], args, [{"prompt": f"prompt {row}"} for row in range(2 * episodes)], **options
    )
    trainer.train()
    modules = [trainer.model, trainer.collector.reference.module, *(reward.model for reward in trainer.rewards)]
    held = {
        weight.data_ptr(): weight.numel() * weight.element_size() for each in modules for weight in each.parameters()
    }
    return {"peak": peak_mib() - before, "weights": sum(held.values()) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="gpt2", help="a named size of the pretrain stage")
    parser.add_argument("--episodes", type=int, default=8, help="of an update")
    parser.add_argument("--response", type=int, default=32, help="tokens of an answer; with its prompt at most 128")
    parser.add_argument("--out", type=Path, help="also write the table into this file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(run(asked.one[0], Path(asked.one[1]), asked.episodes, asked.response)))
        return
    lines = ["| models | weights held, MiB | peak memory, MiB | share | what there is |", "|---|---|---|---|---|"]
    first = None
    sizes = ["--episodes", str(asked.episodes), "--response", str(asked.response)]
    with tempfile.TemporaryDirectory() as name:
        leave_models(Path(name), asked.size)
        for case, told in CASES.items():
            command = [sys.executable, __file__, "--one", case, name, *sizes]
            out = subprocess.run(command, capture_output=True, text=True, check=False)
            if out.returncode:
                raise SystemExit(out.stderr)
            found = json.loads(out.stdout.strip().splitlines()[-1])
            first = first or found["peak"]
            lines.append(
                f"| {case} | {found['weights']:.0f} | {found['peak']:.0f} | {found['peak'] / first:.0%} | {told} |"
            )
            print(lines[-1], flush=True)
    if asked.out:
        words = " ".join(["--size", asked.size, *sizes])
        head = (
            f"Measured {datetime.date.today()} on {describe_hardware()}, by `python benchmarks/memory.py {words}`.\n\n"
        )
        asked.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
