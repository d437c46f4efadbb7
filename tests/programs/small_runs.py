"""Each training stage as a run of seconds that can be killed, launched on several processes, and compared.

small_runs.py FOLDER JOBS       run the stages in the JSON file JOBS one after the other; torchrun starts it
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import load_file

from rlhf_recipes.core.arguments import parse_arguments
from rlhf_recipes.core.errors import one_line_errors
from rlhf_recipes.training.trainer import SafeTrainer

STAGES = ("pretrain", "sft", "reward", "ppo")
for _stage in STAGES:
    import_module(f"rlhf_recipes.stages.{_stage}")  # here, so that forks find them imported
STEPS = 6
WORDS = "the cat sat on a mat and then it slept while another dog barked at nothing in the yard".split()

# 8 rows a step on any number of processes. The bias of attention keys has a gradient of rounding errors only, which Adam
# with its default epsilon would scale to full steps.
SHARED_FLAGS: dict[str, Any] = {
    "max_steps": STEPS, "global_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
    "adam_epsilon": 1e-6, "logging_steps": 4, "save_steps": 2, "save_strategy": "steps", "report_to": "none",
    "disable_tqdm": True, "seed": 3, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
}  # fmt: skip
STAGE_FLAGS: dict[str, dict[str, Any]] = {
    "pretrain": {"tokenizer_name": "model", "dataset_name": "text", "max_length": 32},
    "sft": {"dataset_name": "demonstrations", "eval_strategy": "steps", "eval_steps": 3},
    "reward": {"dataset_name": "preferences"},
    "ppo": {
        "dataset_name": "prompts", "reward": "reward_model", "response_length": 6, "num_mini_batches": 2, "num_ppo_epochs": 2,
        "hints": False, "max_steps": 10, "logging_steps": 3,
    },
}  # fmt: skip
FOLDERS = {"model_name_or_path", "tokenizer_name", "dataset_name", "reward", "output_dir"}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}


def prepare(folder: Path, model: Any, reward_model: Any, tokenizer: Any) -> Path:
    """Write what the stages read: a policy whose answers end, a reward model, and rows of unequal length.

    The rows fill no whole number of batches, so that an epoch ends within a run.
    """
    model.generation_config.eos_token_id = list(range(200, 256))
    for name, module in (("model", model), ("reward_model", reward_model)):
        module.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [" ".join(WORDS[start % 7 : start % 7 + 2 + start % 5]) for start in range(43)]
    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": f"{line} {index}"} for index, line in enumerate((lines * 2)[:70])],
        "demonstrations": [{"prompt": f"{index}?", "completion": f" {line}"} for index, line in enumerate(lines)],
        "preferences": [
            {"prompt": f"{index}?", "chosen": f" {line}", "rejected": f" {line[::-1]} no"}
            for index, line in enumerate(lines)
        ],
        "prompts": [{"prompt": f"{line} {index}"} for index, line in enumerate(lines[:20])],
    }
    for name, records in rows.items():
        (folder / name).mkdir(parents=True)
        for split, part in (("train", records), ("test", records[:8])):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def flags(stage: str, folder: Path, out: str, **changes: Any) -> list[str]:
    """Return the command line of a run; paths are relative to `folder`."""
    values = {"model_name_or_path": "model"} | SHARED_FLAGS | STAGE_FLAGS[stage] | {"output_dir": out} | changes
    words: list[str] = []
    for name, value in values.items():
        if value is not None:
            is_path = name in FOLDERS and ":" not in str(value)
            words += [f"--{name}", str(folder / value) if is_path else str(value)]
    return words


def run(stage: str, folder: Path, out: str, **changes: Any) -> Path:
    """Run a stage, or the rest of it with `resume="auto"`; return its output folder."""
    torch.set_num_threads(1)
    run_stage: Callable[..., Path] = getattr(import_module(f"rlhf_recipes.stages.{stage}"), f"run_{stage}")
    types = [hint for name, hint in get_type_hints(run_stage).items() if name != "return"]
    return run_stage(*parse_arguments(*types, argv=flags(stage, folder, out, **changes)))


def saved_state(folder: Path) -> dict[str, Any]:
    """Return the weights, optimizer and log of a finished run, without times."""
    state = json.loads((folder / "trainer_state.json").read_text())
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    states = {name: torch.load(last / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler")}
    return {"log": [without_times(entry) for entry in state["log_history"]], "weights": weights_in(folder), **states}


def identical(one: Any, other: Any) -> bool:
    """Return whether two nested structures are equal, their tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the saved model, the value model's too."""
    paths = [path for path in folder.rglob("*.safetensors") if "checkpoint-" not in str(path.relative_to(folder))]
    return {f"{path.relative_to(folder)}:{name}": each for path in paths for name, each in load_file(path).items()}


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Return the largest absolute difference of any weight. A tied head is saved once."""
    assert one.keys() == other.keys() and one
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


TIMES = (
    "time/",
    "train_runtime",
    "train_samples_per",
    "train_steps_per",
    "eval_runtime",
    "eval_samples_per",
    "eval_steps_per",
)


def without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a log entry without times and without what Trainer restarts in each call of `train`."""
    restarted = {"eps", "train_loss", "total_flos", "train_tokens_per_second"}
    return {name: value for name, value in entry.items() if not name.startswith(TIMES) and name not in restarted}


def die_at(step: int, how: str) -> None:
    """From now on the last process of the run dies in this optimizer step: of a signal, or of an error."""
    training_step = SafeTrainer.training_step

    def die(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and self.args.process_index == self.args.world_size - 1:
            SafeTrainer.training_step = training_step  # type: ignore[method-assign]
            if how == "error":
                raise RuntimeError("this process fails on purpose")
            os.kill(os.getpid(), int(how))
        return training_step(self, *args, **kwargs)

    SafeTrainer.training_step = die  # type: ignore[method-assign]


def run_jobs(folder: Path, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Run one after the other, as a recipe does. A job has `stage`, `out`, further flags and, to die, `dies`: [step, how]."""
    with one_line_errors():
        for job in jobs:
            changes = dict(job)
            if "dies" in changes:
                die_at(*changes.pop("dies"))
            run(changes.pop("stage"), folder, changes.pop("out"), **changes)


if __name__ == "__main__":
    run_jobs(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
