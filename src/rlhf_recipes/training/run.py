"""What surrounds a trainer, whatever it trains: a folder that may be used, the run itself, the model it leaves."""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rlhf_recipes.core.arguments import requested_values
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.secrets import redact
from rlhf_recipes.folders import (
    RECIPE_FILE,
    STAGING_FOLDER,
    check_output_folder,
    clear_output_folder,
    disk_full_as_user_error,
    find_checkpoint,
    folder_lock,
    move_files_into,
    require_unlocked,
)
from rlhf_recipes.hub import HubArguments, check_push, open_requested_repo, push_if_requested
from rlhf_recipes.system import check_launch

# Says nothing of what is learnt.
HOW = {
    "resume",
    "resume_from_checkpoint",
    "overwrite",
    "output_dir",
    "hub_strategy",
    "disable_tqdm",
    "log_level",
    "report_to",
    "save_total_limit",
    *HubArguments.__dataclass_fields__,
}

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """checkpoint: what to go on from, if anything; asked: all that says what is learnt; finished: `--resume auto` found
    nothing left to do; continues: the checkpoint is of this folder, so that what is in it stays."""

    folder: Path
    checkpoint: str | None
    asked: dict[str, Any]
    finished: bool = False
    continues: bool = False


def open_run(training: Any, *others: Any, inputs: Sequence[str | None]) -> Run:
    """The folder of a run and where in it to begin. All is checked, nothing is written; a finished run that was asked to
    be pushed is pushed.

    training, others: the stage's arguments, among them one with `overwrite`.
    inputs: the models and datasets that are read, none of which may live in the folder.

    Raises:
        UserError: the folder holds something else, or somebody else's run; the launch is not what it asked for.
    """
    check_launch(training)
    check_push(training)
    folder = Path(training.output_dir)
    require_unlocked(folder)
    auto, asked = training.resume == "auto", _asked(training, *others)
    overwrite = any(getattr(each, "overwrite", False) for each in others)
    finished = auto and (folder / RECIPE_FILE).is_file()
    if finished and not overwrite:
        changed = _changed(yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8")) or {}, asked)
        if changed:
            raise UserError(
                f"output folder {folder} holds a finished run that was asked otherwise ({changed}); choose another "
                "--output_dir, or pass --overwrite true"
            )
        logger.warning("%s is finished; there is nothing to resume", folder)
        if training.process_index == 0:
            push_if_requested(folder, training)
        return Run(folder, None, asked, finished=True)
    # A finished run that may be replaced is begun anew, or its last weights would come out under another recipe.
    own = find_checkpoint("auto", folder) if auto and not finished else None
    checkpoint = own or find_checkpoint(training.resume_from_checkpoint, folder)
    continues = checkpoint is not None and Path(checkpoint).parent.resolve() == folder.resolve()
    read = [*inputs, None if continues else checkpoint]
    check_output_folder(folder, overwrite, read, resuming=continues, restarting=auto)
    if checkpoint is not None and (changed := _changed(_asked_then(checkpoint), asked)):
        logger.warning("%s was asked otherwise than this run goes on: %s", checkpoint, changed)
    training.distributed_state.wait_for_everyone()  # no process looks for another's lock once the first has one
    return Run(folder, checkpoint, asked, continues=continues)


def _asked(*arguments: Any) -> dict[str, Any]:
    asked = {name: value for name, value in requested_values(*arguments).items() if name not in HOW}
    return json.loads(redact(json.dumps(asked)))  # as it is written down, and as a difference is told


def _asked_then(checkpoint: str) -> dict[str, Any]:
    told = Path(checkpoint) / "progress_0.json"
    return json.loads(told.read_text(encoding="utf-8")).get("asked") or {} if told.is_file() else {}


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`name then -> now` of each that differs; nothing where it is not known what was asked then."""
    names = sorted(name for name in {*then, *now} - HOW if then and then.get(name) != now.get(name))
    return ", ".join(f"{name} {then.get(name, 'unset')} -> {now.get(name, 'unset')}" for name in names)


@contextmanager
def under_way(trainer: Any, run: Run) -> Iterator[None]:
    """For the time, no other process writes into the folder; it is emptied of what an earlier run left, if this one
    begins; at the end it is pushed, if that is asked for."""
    trainer.asked = run.asked
    if trainer.is_world_process_zero():
        open_requested_repo(trainer.args)
    held = folder_lock(run.folder) if trainer.args.should_save else nullcontext()
    with held, disk_full_as_user_error(run.folder):
        if trainer.args.should_save and not run.continues:
            clear_output_folder(run.folder)
        trainer.accelerator.wait_for_everyone()
        yield
        if trainer.is_world_process_zero():
            push_if_requested(run.folder, trainer.args)


def train(trainer: Any, run: Run) -> dict[str, Any]:
    """Train, from the start or on from the checkpoint; returns loss, seconds and steps."""
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=run.checkpoint)
    return {
        "train_loss": result.training_loss,
        "seconds": time.perf_counter() - started,
        "steps": result.global_step,
    }


def save_model(trainer: Any, folder: Path) -> None:
    """Leave the model (or its adapter), its tokenizer, how its answers end, and the log of its training.

    Every process calls it. The files come into the folder once all of them are whole.

    Raises:
        UserError: a weight is not finite.
    """
    trainer.require_finite_weights()
    staged = folder / STAGING_FOLDER / "model"
    trainer.save_model(str(staged), _internal_call=True)
    if not trainer.args.should_save:
        return
    # An adapter is saved without it, and in the model's own Trainer has named the tokenizer's EOS.
    generation_config = getattr(trainer.accelerator.unwrap_model(trainer.model), "generation_config", None)
    if generation_config is not None:
        generation_config.save_pretrained(staged)
    trainer.state.save_to_json(str(staged / "trainer_state.json"))
    (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same in the open
    move_files_into(staged, folder)
    shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)


def measures(trainer: Any) -> bool:
    """Whether this process takes part in measuring the model: the first, or all of them where the weights are cut apart,
    since each pass over such weights is a meeting of all."""
    return bool(trainer.is_world_process_zero() or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def select_logged_panels(
    panels: Sequence[tuple[str, Sequence[str]]], log_history: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    """Panels of curves, less the keys that this run did not log and the panels that are then empty."""
    logged = {key for entry in log_history for key, value in entry.items() if value is not None}
    kept = [(title, [key for key in keys if key in logged]) for title, keys in panels]
    return [(title, keys) for title, keys in kept if keys]
