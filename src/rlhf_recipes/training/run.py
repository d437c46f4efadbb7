"""A training run from its folder to its card: what all training stages share.

`run_training` is the whole story; the functions below it are its steps, in order.
"""

import copy
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import TrainingArguments, set_seed

from rlhf_recipes.core.arguments import requested_values
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.secrets import redact
from rlhf_recipes.folders import (
    RECIPE_FILE,
    STAGING_FOLDER,
    check_output_folder,
    clear_output_folder,
    complete_output_folder,
    disk_full_as_user_error,
    find_checkpoint,
    folder_lock,
    move_files_into,
    require_unlocked,
)
from rlhf_recipes.hub import HubArguments, check_push, open_requested_repo, push_if_requested
from rlhf_recipes.reports import plot_curves
from rlhf_recipes.system import check_launch, choose_precision, configure_cpu_runtime_
from rlhf_recipes.training.defaults import LORA_FACTOR
from rlhf_recipes.training.options import check_options, library_errors_as_user_errors
from rlhf_recipes.training.trainer import SafeTrainer

# Options that do not change what is trained.
OPERATIONAL_OPTIONS = {
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

Panels = Sequence[tuple[str, Sequence[str]]]


class Measured(NamedTuple):
    """What a stage measures after training: numbers for metrics.json, and images for the card beside the curves."""

    metrics: dict[str, Any]
    images: tuple[str, ...] = ()


class Run(NamedTuple):
    """Where a run writes and begins.

    checkpoint: the checkpoint to resume from, or None. requested: the options that decide what is trained. finished:
    `--resume auto` found nothing left to do. resumes_here: the checkpoint lies in this folder, so its files are kept.
    """

    folder: Path
    checkpoint: str | None
    requested: dict[str, Any]
    finished: bool = False
    resumes_here: bool = False


def run_training(
    stage: str,
    arguments: Sequence[Any],
    build: Callable[[], SafeTrainer],
    measure: Callable[[Any, Path], Measured],
    *,
    title: str,
    parents: Mapping[str, str | None],
    inputs: Sequence[str | None],
    plot_title: str,
    panels: Panels | None = None,
    measure_before: Callable[[Any], dict[str, Any]] | None = None,
) -> Path:
    """Train, measure and leave the stage's folder; returns its path. All ranks must call it.

    Args:
        arguments: the stage's dataclasses; one is a `TrainingArguments`.
        build: makes the trainer; it raises `UserError` before anything is written.
        measure: (trainer, folder) -> what was measured; every process calls it once the model is saved.
        parents: what the card names as origin, by role.
        inputs: the models and datasets that are read; none of them may lie in the output folder.
        panels: the curves to plot; None plots every logged number.
        measure_before: (trainer) -> held-out numbers, which metrics.json holds as `<name>_before`; it writes nothing.
    """
    training = next(each for each in arguments if isinstance(each, TrainingArguments))
    run = plan_run(training, *(each for each in arguments if each is not training), inputs=inputs)
    if run.finished:
        if training.process_index == 0:
            push_if_requested(run.folder, training)
        return run.folder
    with library_errors_as_user_errors():
        trainer = build()
    trainer.requested = run.requested  # each checkpoint holds it
    if training.eval_before_training:
        trainer.measure_before = measure_before
    if trainer.is_world_process_zero():
        open_requested_repo(trainer.args)
    with locked_run_folder(trainer, run):
        metrics = train(trainer, run)
        save_final_model(trainer, run.folder)
        measured = measure(trainer, run.folder)
        before = {f"{name}_before": value for name, value in trainer.measured_before.items()}
        if trainer.is_world_process_zero():
            trainer.save_state()
            log = trainer.state.log_history
            shown = None if panels is None else select_logged_panels(panels, log)
            plot_curves(log, run.folder / "curves.png", shown, title=plot_title)
            complete_output_folder(
                run.folder,
                stage=stage,
                title=title,
                parents=parents,
                metrics=metrics | before | measured.metrics | counted_rows(trainer),
                arguments=arguments,
                images=["curves.png", *measured.images],
            )
            push_if_requested(run.folder, trainer.args)
    return run.folder


def plan_run(training: Any, *others: Any, inputs: Sequence[str | None]) -> Run:
    """Decide where a run writes and from which checkpoint it begins. Checks everything and writes nothing.

    training, others: the stage's arguments, one of them with a field `overwrite`.

    Raises:
        UserError: the folder holds something else or another process's run; the launch is not what was configured.
    """
    check_launch(training)
    check_push(training)
    check_options(training, *others)
    folder = Path(training.output_dir)
    require_unlocked(folder)
    auto, requested = training.resume == "auto", _trained_options(training, *others)
    overwrite = any(getattr(each, "overwrite", False) for each in others)
    finished = auto and (folder / RECIPE_FILE).is_file()
    if finished and not overwrite:
        before = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8")) or {}
        if changed := _changed_options(before, requested):
            raise UserError(
                f"output folder {folder} holds a finished run with other options ({changed}); choose another "
                "--output_dir, or pass --overwrite true"
            )
        logger.warning("%s is finished; there is nothing to resume", folder)
        return Run(folder, None, requested, finished=True)
    # A finished run that may be replaced starts from scratch, or its last weights would appear under another recipe.
    checkpoint = find_checkpoint("auto", folder) if auto and not finished else None
    checkpoint = checkpoint or find_checkpoint(training.resume_from_checkpoint, folder)
    resumes_here = checkpoint is not None and Path(checkpoint).parent.resolve() == folder.resolve()
    sources = [*inputs, None if resumes_here else checkpoint]
    check_output_folder(folder, overwrite, sources, resuming=resumes_here, restarting=auto)
    if checkpoint is not None and (changed := _changed_options(_checkpoint_options(checkpoint), requested)):
        logger.warning("%s was saved with other options than this run: %s", checkpoint, changed)
    training.distributed_state.wait_for_everyone()  # no process looks for a lock once the first one holds it
    return Run(folder, checkpoint, requested, resumes_here=resumes_here)


def _trained_options(*arguments: Any) -> dict[str, Any]:
    options = {name: value for name, value in requested_values(*arguments).items() if name not in OPERATIONAL_OPTIONS}
    return json.loads(redact(json.dumps(options)))  # as it is written to files and shown in messages


def _checkpoint_options(checkpoint: str) -> dict[str, Any]:
    progress = Path(checkpoint) / "progress_0.json"
    return json.loads(progress.read_text(encoding="utf-8")).get("requested") or {} if progress.is_file() else {}


def _changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return `name before -> now` of each option that differs; nothing where the earlier options are unknown."""
    options = {*before, *now} - OPERATIONAL_OPTIONS
    names = sorted(name for name in options if before and before.get(name) != now.get(name))
    return ", ".join(f"{name} {before.get(name, 'unset')} -> {now.get(name, 'unset')}" for name in names)


@contextmanager
def locked_run_folder(trainer: SafeTrainer, run: Run) -> Iterator[None]:
    """Lock the run's folder within this block; deletes what an earlier run left there, unless this one resumes in it."""
    lock = folder_lock(run.folder) if trainer.args.should_save else nullcontext()
    with lock, disk_full_as_user_error(run.folder):
        if trainer.args.should_save and not run.resumes_here:
            clear_output_folder(run.folder)
        trainer.accelerator.wait_for_everyone()
        yield


def train(trainer: SafeTrainer, run: Run) -> dict[str, Any]:
    """Train from the start or from the run's checkpoint; returns loss, seconds and steps."""
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=run.checkpoint)
    return {
        "train_loss": result.training_loss,
        "seconds": time.perf_counter() - started,
        "steps": result.global_step,
    }


def save_final_model(trainer: SafeTrainer, folder: Path) -> None:
    """Leave the model (or its adapter), its tokenizer, its generation config and the training log in `folder`.

    All ranks must call it. The files are moved into the folder once all of them are complete.

    Raises:
        UserError: a weight is not finite.
    """
    trainer.require_finite_weights()
    staged = folder / STAGING_FOLDER / "model"
    trainer.save_model(str(staged), _internal_call=True)
    if not trainer.args.should_save:
        return
    # An adapter is saved without it, and Trainer has written the tokenizer's EOS into the model's own.
    generation_config = getattr(trainer.accelerator.unwrap_model(trainer.model), "generation_config", None)
    if generation_config is not None:
        generation_config.save_pretrained(staged)
    trainer.state.save_to_json(str(staged / "trainer_state.json"))
    (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml holds the same as text
    move_files_into(staged, folder)
    shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)


def counted_rows(trainer: SafeTrainer) -> dict[str, dict[str, dict[str, int]]]:
    """Return, as `rows`, how many rows of each split were read, dropped, cut and used; nothing if they were not counted."""
    rows = {split: dict(counts) for split, counts in (trainer.row_counts or {}).items()}
    return {"rows": rows} if rows else {}


def measures_model(trainer: SafeTrainer) -> bool:
    """Return whether this process runs the model when it is measured: rank 0, or all ranks where weights are sharded.

    A forward pass over sharded weights is a collective operation, which all ranks must call.
    """
    return bool(trainer.is_world_process_zero() or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def select_logged_panels(panels: Panels, log_history: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the panels of curves without the keys that this run did not log, and without empty panels."""
    logged = {key for entry in log_history for key, value in entry.items() if value is not None}
    selected = [(title, [key for key in keys if key in logged]) for title, keys in panels]
    return [(title, keys) for title, keys in selected if keys]


def training_inputs(model_config: Any, arguments: Any, *others: str | None) -> list[str | None]:
    """Return the sources that every training stage reads: model, dataset, extra datasets; `others` follow."""
    extra = arguments.extra_dataset_names or []
    return [model_config.model_name_or_path, arguments.dataset_name, *extra, *others]


def prepare_process_(training: Any, width: int, *, adapter: bool = False, **changes: Any) -> Any:
    """Configure this process for a run, and return a copy of the training arguments for it.

    Sets CPU threads and memory options for a model `width` units wide, and seeds all random generators with `training.seed`.
    The copy has its precision chosen for this machine, the learning rate of an adapter where one is trained and no rate is
    set, and `changes`.
    """
    prepared = copy.copy(choose_precision(training, width))
    configure_cpu_runtime_(prepared, width)
    if adapter and prepared.__dict__.get("_learning_rate_by_default"):
        prepared.learning_rate = LORA_FACTOR * prepared.usual_learning_rate
        logger.warning(
            "learning_rate %g, ten times that of full training, since an adapter is trained", prepared.learning_rate
        )
    for name, value in changes.items():
        setattr(prepared, name, value)
    set_seed(training.seed)
    return prepared
