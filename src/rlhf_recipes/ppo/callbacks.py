"""Where an update ends among Trainer's steps, and the line that tells of it."""

from collections.abc import Callable
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from rlhf_recipes.ppo.config import PPOConfig


class UpdateEnd(TrainerCallback):
    """Calls `ended` after the last optimizer step of each update; the first and the last update are always logged."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended

    def on_step_end(self, args: PPOConfig, state: Any, control: Any, **kwargs: Any) -> None:
        last = control.should_training_stop or state.global_step >= state.max_steps
        if state.global_step % args.steps_per_update == 0 or last:
            self.ended()
            control.should_log |= last or state.global_step == args.steps_per_update


class UpdateLine(ProgressCallback):
    """Trainer's progress bar, with one short line an update in place of all that is logged."""

    SHOWN = {
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
        parts = [text.format(logs[name]) for name, text in self.SHOWN.items() if name in logs]
        rewards = [name for name in logs if name.startswith("rewards/")]
        if len(rewards) > 1:
            parts += [f"{name.removeprefix('rewards/')} {logs[name]:.3f}" for name in rewards]
        if parts and self.training_bar is not None:
            self.training_bar.write("  ".join(parts))
