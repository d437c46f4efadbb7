"""Callbacks of PPO: the boundaries of an update, its line in the progress bar, and its completions."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from rlhf_recipes.core.files import write_text
from rlhf_recipes.ppo.config import PPOConfig


class UpdateBoundaries(TrainerCallback):
    """Calls `on_begin` when training begins and `on_update_end` after the last optimizer step of each update.

    The first and the last update are always logged.
    """

    def __init__(self, on_begin: Callable[[], None], on_update_end: Callable[[], None]) -> None:
        self.on_begin, self.on_update_end = on_begin, on_update_end

    def on_train_begin(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_begin()

    def on_step_end(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer counts the steps of an epoch from the point of resumption.
        state.epoch = state.global_step / kwargs["train_dataloader"].steps_per_epoch
        last = control.should_training_stop or state.global_step >= state.max_steps
        if state.global_step % args.steps_per_update == 0 or last:
            self.on_update_end()
            control.should_log |= last or state.global_step == args.steps_per_update

    def on_epoch_end(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= (
            control.should_training_stop
        )  # another callback stopped the run after the step was logged


class UpdateProgress(ProgressCallback):
    """`Trainer`'s progress bar, with one short line per update instead of the whole log entry."""

    FORMATS = {
        "episode": "episode {:.0f}",
        "objective/scores": "score {:.3f}",
        "objective/kl": "KL {:.2f}",
        "completions/mean_length": "length {:.1f}",
        "completions/eos_share": "stopped {:.0%}",
        "policy/entropy_avg": "entropy {:.2f}",
        "val/explained_variance": "value explains {:.0%}",
    }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        parts = [text.format(logs[name]) for name, text in self.FORMATS.items() if name in logs]
        rewards = [name for name in logs if name.startswith("rewards/")]
        if len(rewards) > 1:
            parts += [f"{name.removeprefix('rewards/')} {logs[name]:.3f}" for name in rewards]
        if parts and self.training_bar is not None:
            self.training_bar.write("  ".join(parts))


class SampleTable(TrainerCallback):
    """Sends sample answers to every reporter that can show text, `num_sample_generations` times in a run.

    samples: returns the latest answers. reporters: returns the callbacks of the run.
    """

    def __init__(self, samples: Callable[[], list[dict[str, Any]]], reporters: Callable[[], Sequence[Any]]) -> None:
        self.samples, self.reporters = samples, reporters
        self._shown = 0

    def on_train_begin(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self._shown = _due(args, state, state.global_step // args.steps_per_update)

    def on_log(self, args: PPOConfig, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any) -> None:
        rows, due = self.samples()[:16], _due(args, state, -(-state.global_step // args.steps_per_update))
        if state.is_world_process_zero and "episode" in (logs or {}) and rows and due > self._shown:
            self._shown = due
            for reporter in self.reporters():
                _show(reporter, rows, state.global_step)


def _due(args: PPOConfig, state: Any, update: int) -> int:
    """Return how many times samples are due by the end of this update; the times are spread evenly over the run."""
    updates = max(1, -(-state.max_steps // args.steps_per_update))
    return -(-update * min(args.num_sample_generations, updates) // updates)


def _show(reporter: Any, rows: list[dict[str, Any]], step: int) -> None:
    """Send a table to Weights & Biases or Trackio, text to TensorBoard; other reporters accept numbers only."""
    wandb, trackio = getattr(reporter, "_wandb", None), getattr(reporter, "_trackio", None)
    if getattr(reporter, "tb_writer", None) is not None:
        lines = [" | ".join(str(value).replace("\n", " ") for value in row.values()) for row in rows]
        head = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
        reporter.tb_writer.add_text("completions", "\n".join([*head, *lines]), step)
    elif wandb is not None and wandb.run is not None:
        wandb.log(
            {"completions": wandb.Table(list(rows[0]), [[str(value) for value in row.values()] for row in rows])}
        )
    elif trackio is not None:
        import pandas

        trackio.log({"completions": trackio.Table(dataframe=pandas.DataFrame(rows).astype(str))})


class CompletionsFile:
    """A JSON Lines file with one line per episode: the update, prompt, completion and scores."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def in_folder(cls, folder: Any) -> "CompletionsFile":
        return cls(Path(str(folder)) / "completions.jsonl")

    def begin(self, updates: int) -> None:
        """Keep the lines of the first `updates` updates: none in a new run, those of the checkpoint in a resumed one."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").split("\n")  # an answer may hold other line separators
            kept = [line for line in lines if _update_of(line) < updates]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, update: int, rows: Sequence[dict[str, Any]]) -> None:
        """Append the episodes of an update."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps({"update": update} | row, ensure_ascii=False) + "\n" for row in rows))


def _update_of(line: str) -> float:
    """Return the update of a line; infinity for a line that was not written completely."""
    try:
        return int(json.loads(line)["update"])
    except ValueError:
        return float("inf")
