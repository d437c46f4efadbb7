"""A short PPO run that goes on where it was killed, and a parent that kills it: used by tests and by hand.

kill_and_resume.py FOLDER KILLS [SEED]     kill runs of every case in FOLDER until there were so many kills, and tell the tally
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tqdm import tqdm

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
    """The whole run, or what is left of it after the last complete checkpoint in the folder."""
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


def end_of(folder: Path) -> dict[str, Any]:
    """Everything that a finished run left in its last checkpoint and beside it, but for what the clock says."""
    last = folder / f"checkpoint-{STEPS}"
    state = json.loads((last / "trainer_state.json").read_text())
    log = [
        {name: value for name, value in entry.items() if not name.startswith("time/") and name != "eps"}
        for entry in state["log_history"]
    ]
    weights = {str(path.relative_to(last)): load_file(path) for path in sorted(last.rglob("*model*.safetensors"))}
    weights |= {str(path.relative_to(last)): load_file(path) for path in sorted(last.rglob("value_head.safetensors"))}
    kept = {name: torch.load(last / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler")}
    told = json.loads((last / "progress_0.json").read_text())
    answers = (folder / "completions.jsonl").read_text()
    return {"log": log, "weights": weights, **kept, "experience": told["experience"], "answers": answers}


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def fork() -> int:
    """As os.fork; the child's progress bars have a lock of their own. The usual one is shared by all forks of a process, and
    one that is killed while it holds it would lock the others out for ever. A kind of bar may have been given it by name."""
    tqdm.get_lock()
    child = os.fork()
    if child == 0:
        lock, kinds = threading.RLock(), [tqdm]
        while kinds:
            kind = kinds.pop()
            kind.set_lock(lock)
            kinds += kind.__subclasses__()
    return child


def attempt(run: Callable[[], Any], seconds: float | None) -> bool:
    """Run in a process of its own, killed after so many seconds unless it has ended; returns whether it was killed."""
    child = fork()
    if child == 0:
        code = 1
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds if seconds is not None else None
    with not_left_behind(child):
        while deadline is not None and time.monotonic() <= deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.002)
        else:
            if deadline is not None:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run ended with {code}")
    return code != 0


@contextmanager
def not_left_behind(child: int) -> Iterator[None]:
    """A test that is told to end while it waits for its child ends the child as well."""
    try:
        yield
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise


def killed_until_done(policy: Path, folder: Path, case: str, draw: random.Random, longest: float) -> int:
    """Kill the run at random moments until it has ended; returns how often it was killed.

    The moments come later and later, so that it ends on a machine of any speed.
    """
    kills = 0
    while attempt(lambda: train(policy, folder, case), draw.uniform(0.0, longest * (1 + kills / 10))):
        kills += 1
    return kills


def main(folder: Path, wanted: int, seed: int = 0) -> None:
    torch.set_num_threads(1)
    draw, tally = random.Random(seed), {}
    for case in CASES:
        shutil.rmtree(folder / case, ignore_errors=True)
        started = time.monotonic()
        attempt(lambda case=case: train(folder / "policy", folder / case / "whole", case), None)  # type: ignore[misc]
        longest, expected = time.monotonic() - started, end_of(folder / case / "whole")
        kills = runs = mismatches = 0
        while kills < wanted / len(CASES):
            part = folder / case / str(runs)
            kills += killed_until_done(folder / "policy", part, case, draw, longest)
            runs += 1
            mismatches += not same(end_of(part), expected)
            print(f"{case}: {kills} kills and resumes in {runs} runs, {mismatches} mismatches", flush=True)
        tally[case] = {"kills": kills, "runs": runs, "mismatches": mismatches}
    print(json.dumps(tally))
    sys.exit(1 if any(each["mismatches"] for each in tally.values()) else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:4]))
