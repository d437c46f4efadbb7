"""What `SafeTrainer` does where `Trainer` calls callbacks only."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from rlhf_recipes.training.disk import log_disk_use
from rlhf_recipes.training.sigterm import StoppedBySignal

if TYPE_CHECKING:
    from rlhf_recipes.training.trainer import SafeTrainer


class StepHooks(TrainerCallback):
    """Calls the trainer at the start, before each optimizer step and at each checkpoint."""

    def __init__(self, trainer: "SafeTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if state.is_world_process_zero:
            log_disk_use(trainer.model, args, state)
        if trainer._resuming_from is not None:
            trainer.load_progress(Path(trainer._resuming_from))
        elif trainer.measure_before is not None:
            with unchanged_by_measuring(trainer.accelerator.unwrap_model(trainer.model)):
                measured = trainer.measure_before(trainer)
            trainer.measured_before = {name: value for name, value in measured.items() if isinstance(value, float)}
            trainer.accelerator.wait_for_everyone()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.synchronize_stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.trainer._stopping

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._stopping:
            raise StoppedBySignal(f"stopped by SIGTERM; saved at step {state.global_step}: resume with --resume auto")


@contextmanager
def unchanged_by_measuring(model: nn.Module) -> Iterator[None]:
    """Within this block random numbers may be drawn and the model may be run: afterwards training goes on as without it.

    Restores the random states of Python, NumPy and torch, the model's mode, and the autocast around its forward pass.
    """
    python, numpy, training = random.getstate(), np.random.get_state(), model.training
    wrapping: dict[str, Any] = {
        name: vars(model)[name] for name in ("forward", "_original_forward") if name in vars(model)
    }
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        model.train(training)
        vars(model).update(wrapping)
