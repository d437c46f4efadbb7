"""Where an update ends among Trainer's steps."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

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
