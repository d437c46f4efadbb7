"""What surrounds a trainer, whatever it trains: a folder that may be used, the run itself, the model it leaves."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.artifacts import check_output_folder, prepare_output_folder, resume_point


def open_run(training: Any, overwrite: bool, inputs: Sequence[str | None]) -> tuple[Path, str | None]:
    """The output folder and the checkpoint to go on from, if any; both checked, nothing written.

    inputs: the models and datasets that are read, none of which may live in the folder.
    """
    checkpoint = resume_point(training.resume_from_checkpoint, training.output_dir)
    folder = check_output_folder(training.output_dir, overwrite, inputs, resuming=checkpoint is not None)
    return folder, checkpoint


def train(trainer: Any, folder: Path, checkpoint: str | None) -> dict[str, Any]:
    """Train in a folder emptied of what an earlier run left, or on from the checkpoint; loss, seconds and steps."""
    if trainer.is_world_process_zero() and checkpoint is None:
        prepare_output_folder(folder)
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "train_loss": result.training_loss,
        "seconds": time.perf_counter() - started,
        "steps": result.global_step,
    }


def save_model(trainer: Any, folder: Path) -> None:
    """Leave the model (or its adapter), its tokenizer, how its answers end, and the log of its training."""
    trainer.save_model(str(folder))
    # An adapter is saved without it.
    trainer.accelerator.unwrap_model(trainer.model).generation_config.save_pretrained(folder)
    trainer.save_state()


def logged_panels(
    panels: Sequence[tuple[str, Sequence[str]]], log_history: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    """Panels of curves, less the keys that this run did not log and the panels that are then empty."""
    logged = {key for entry in log_history for key, value in entry.items() if value is not None}
    kept = [(title, [key for key in keys if key in logged]) for title, keys in panels]
    return [(title, keys) for title, keys in kept if keys]
