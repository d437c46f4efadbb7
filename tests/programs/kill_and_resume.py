"""Kill short PPO runs at random moments and resume them; used by tests and by hand.

kill_and_resume.py FOLDER KILLS [SEED]     kill runs of every case in FOLDER until there were KILLS kills; print the counts
"""

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from programs.forks import was_killed
from programs.small_runs import identical

from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.trainer import PPOTrainer

STEPS = 22  # of optimizer steps: five updates of four, and half of one
CASES: dict[str, dict[str, Any]] = {
    "full": {"adaptive_kl_target": 0.5, "use_score_scaling": True, "use_score_norm": True},
    "upper": {"num_layers_unfrozen": 1},
    "lora": {"lora": True, "target_kl": 0.02, "value_learning_rate": 3e-3, "value_warmup_updates": 1},
}


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token < 128 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def train(policy: Path, folder: Path, case: str) -> PPOTrainer:
    """Run PPO, or the rest of it after the last complete checkpoint in the folder."""
    options = dict(CASES[case])
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    args = PPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_mini_batches=2,
        num_ppo_epochs=2, response_length=6, learning_rate=1e-3, max_steps=STEPS, logging_steps=3, save_steps=1,
        save_total_limit=2, report_to="none", disable_tqdm=True, hints=False, use_cpu=True, seed=5,
        eval_strategy="steps", eval_steps=5, lr_scheduler_type="cosine",
        **{name: value for name, value in options.items() if name != "lora"},
    )  # fmt: skip
    trainer = PPOTrainer(
        str(policy),
        low_share,
        args,
        [{"prompt": "word " * (row % 3) + str(row)} for row in range(20)],
        [{"prompt": f"held out {row}"} for row in range(4)],
        peft_config=adapter if options.get("lora") else None,
    )
    trainer.train(resume_from_checkpoint="auto")
    return trainer


def saved_state(folder: Path) -> dict[str, Any]:
    """Return everything that a finished run saved in its last checkpoint and beside it, without times."""
    last = folder / f"checkpoint-{STEPS}"
    state = json.loads((last / "trainer_state.json").read_text())
    log = [
        {name: value for name, value in entry.items() if not name.startswith("time/") and name != "eps"}
        for entry in state["log_history"]
    ]
    weights = {str(path.relative_to(last)): load_file(path) for path in sorted(last.rglob("*model*.safetensors"))}
    weights |= {str(path.relative_to(last)): load_file(path) for path in sorted(last.rglob("value_head.safetensors"))}
    states = {name: torch.load(last / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler")}
    progress = json.loads((last / "progress_0.json").read_text())
    answers = (folder / "completions.jsonl").read_text()
    return {"log": log, "weights": weights, **states, "collector": progress["collector"], "answers": answers}


def killed_until_done(policy: Path, folder: Path, case: str, draw: random.Random, longest: float) -> int:
    """Kill the run at random moments until it has ended; return how often it was killed.

    The moments come later each time, so that it ends on a machine of any speed.
    """
    kills = 0
    while was_killed(lambda: train(policy, folder, case), draw.uniform(0.0, longest * (1 + kills / 10))):
        kills += 1
    return kills


def main(folder: Path, wanted: int, seed: int = 0) -> None:
    torch.set_num_threads(1)
    draw, counts = random.Random(seed), {}
    for case in CASES:
        shutil.rmtree(folder / case, ignore_errors=True)
        started = time.monotonic()
        was_killed(lambda case=case: train(folder / "policy", folder / case / "uninterrupted", case))  # type: ignore[misc]
        longest, expected = time.monotonic() - started, saved_state(folder / case / "uninterrupted")
        kills = runs = mismatches = 0
        while kills < wanted / len(CASES):
            part = folder / case / str(runs)
            kills += killed_until_done(folder / "policy", part, case, draw, longest)
            runs += 1
            mismatches += not identical(saved_state(part), expected)
            print(f"{case}: {kills} kills and resumes in {runs} runs, {mismatches} mismatches", flush=True)
        counts[case] = {"kills": kills, "runs": runs, "mismatches": mismatches}
    print(json.dumps(counts))
    sys.exit(1 if any(each["mismatches"] for each in counts.values()) else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:4]))
