"""Peak memory of PPO with four separate models, and with one base for all roles; each case in a separate process.

    python benchmarks/memory.py [--size gpt2] [--out docs/memory.md]

Two updates of eight episodes of 32 tokens on a model with random weights, in float32 on a CPU and in bfloat16 on a
GPU. The peak is that of the resident set minus the imports, or on a GPU of its allocated memory. "weights" counts each
weight once."""

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
    "four models, LoRA on the policy": "adapter on the policy; separate value model, reference and reward model",
    "one base, four roles": "adapters for policy, value and reward model on one base; the reference is the base",
    "one 4-bit base, four roles": "the same on an NF4 base",
}


def lora(task: str, **options: Any) -> LoraConfig:
    """Return the LoRA of every case."""
    return LoraConfig(task_type=task, r=8, target_modules=TARGETS, fan_in_fan_out=True, **options)


def save_models(folder: Path, size: str) -> None:
    """Save a base, a full reward model, and the same reward model as an adapter on the base."""
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
    """Train a case and return its peak memory and the size of its weights, in MiB."""
    torch.set_num_threads(1)
    gc.collect()
    imports_mib, gpu = peak_mib(), torch.cuda.is_available()
    one_base, four_bits = case.startswith("one"), "4-bit" in case
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
    sizes = {
        weight.data_ptr(): weight.numel() * weight.element_size()
        for module in modules
        for weight in module.parameters()
    }
    return {"peak": peak_mib() - imports_mib, "weights": sum(sizes.values()) / 2**20}


def main() -> None:
    """Run each case in a process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="gpt2", help="a named size of the pretrain stage")
    parser.add_argument("--episodes", type=int, default=8, help="episodes of an update")
    parser.add_argument("--response", type=int, default=32, help="tokens of an answer; at most 128 with its prompt")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # case, folder: run it in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one[0], Path(options.one[1]), options.episodes, options.response)))
        return
    lines = ["| models | weights, MiB | peak memory, MiB | share | which models |", "|---|---|---|---|---|"]
    first_peak = None
    sizes = ["--episodes", str(options.episodes), "--response", str(options.response)]
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), options.size)
        for case, description in CASES.items():
            command = [sys.executable, __file__, "--one", case, folder, *sizes]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                raise SystemExit(process.stderr)
            result = json.loads(process.stdout.strip().splitlines()[-1])
            weights, peak = result["weights"], result["peak"]
            first_peak = first_peak or peak
            lines.append(f"| {case} | {weights:.0f} | {peak:.0f} | {peak / first_peak:.0%} | {description} |")
            print(lines[-1], flush=True)
    if options.out:
        command_line = " ".join(["python benchmarks/memory.py --size", options.size, *sizes])
        head = f"Measured {datetime.date.today()} on {describe_hardware()}, by `{command_line}`.\n\n"
        options.out.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
