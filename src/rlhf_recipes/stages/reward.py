"""Preferences or labels -> a judge that scores answers. Two kinds behind one door:

- ranking: pairs of a chosen and a rejected answer, a score each (Bradley-Terry; Stiennon et al. 2020);
- classifier: texts labelled 1 (good) or 0 (bad), whose log-odds are the score (as for sentiment, Ziegler et al. 2019).
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import trl
from transformers import Trainer
from trl import ModelConfig, RewardTrainer

from rlhf_recipes.arguments import DatasetArguments, TrainingDefaults, UserError
from rlhf_recipes.artifacts import check_output_folder, leave_folder, prepare_output_folder
from rlhf_recipes.data import (
    fit_prompts,
    load_train_and_test,
    require_batch,
    require_columns,
    require_texts,
    split_ids,
)
from rlhf_recipes.metrics import calibration_table, compute_classification_metrics, preference_metrics
from rlhf_recipes.models import (
    Start,
    attach_lora,
    check_start,
    fit_to_hardware,
    is_quantized,
    load_judge,
    prepare_for_lora,
    save_judge_config,
    trainable_to_float32,
)
from rlhf_recipes.plots import plot_curves, plot_reliability
from rlhf_recipes.scoring import load_reward
from rlhf_recipes.tensors import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Judge = Literal["auto", "ranking", "classifier"]
PAIR, LABELLED = ("chosen", "rejected"), ("text", "label")
LABELS = {"ranking": 1, "classifier": 2}

logger = logging.getLogger(__name__)


@dataclass
class RewardArguments(DatasetArguments):
    """What the judge learns from: pairs (chosen, rejected and, if there is one, prompt) or labels (text, label)."""

    judge: Judge = field(
        default="auto",
        metadata={
            "help": "ranking learns from the columns chosen and rejected, classifier from text and label (1 good, 0 bad); "
            "auto goes by the columns there are."
        },
    )
    drop_long_prompts: bool = field(
        default=False, metadata={"help": "Leave out pairs whose prompt fills max_length, rather than stop."}
    )

    def __post_init__(self) -> None:
        if self.judge not in get_args(Judge):
            raise UserError(f"unknown judge {self.judge!r}; choose one of {', '.join(get_args(Judge))}")


@dataclass
class RewardConfig(TrainingDefaults, trl.RewardConfig):
    """TRL's `RewardConfig`, for both kinds of judge; rows are as long as the model's context allows."""

    output_dir: str = field(default="runs/reward", metadata={"help": "Folder to leave the judge in."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest row in tokens. Longer pairs are left out, longer labelled texts are cut. "
            "Unset: the model's context."
        },
    )
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept beside the final judge."})


def build_reward_trainer(
    arguments: RewardArguments, model_config: ModelConfig, training: RewardConfig
) -> RewardTrainer | Trainer:
    """Assemble the trainer. Everything that the caller can get wrong is found before weights are read."""
    from transformers import set_seed

    start = check_start(model_config, training.max_length, eos_token=training.eos_token, pad_token=training.pad_token)
    kind, train, test = load_judgements(arguments, start)
    require_batch(len(train), training)
    training = fit_to_hardware(training, start.config.hidden_size)
    training.max_length = start.max_length
    set_seed(training.seed)  # a new head is drawn at random
    model = load_judge(start.name, model_config, labels=LABELS[kind])
    model.config.pad_token_id, model.config.eos_token_id = start.tokenizer.pad_token_id, start.tokenizer.eos_token_id
    model = prepare_for_lora(model, training.gradient_checkpointing)
    build = _ranking_trainer if kind == "ranking" else _classifier_trainer
    trainer = build(model, start, model_config, training, train, test)
    if is_quantized(model):
        trainable_to_float32(trainer.model)
    return trainer


def run_reward(arguments: RewardArguments, model_config: ModelConfig, training: RewardConfig) -> Path:
    """Train a judge and leave a folder that ppo takes as it is, with what the judge is worth on held-out rows."""
    inputs = [model_config.model_name_or_path, arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    resuming = bool(training.resume_from_checkpoint)
    folder = check_output_folder(training.output_dir, arguments.overwrite, inputs, resuming)
    trainer = build_reward_trainer(arguments, model_config, training)
    writes = trainer.is_world_process_zero()
    if writes and not resuming:
        prepare_output_folder(folder)
    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    metrics = {"train_loss": result.training_loss, "seconds": time.perf_counter() - started, "steps": result.global_step}
    if trainer.eval_dataset is not None:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    if writes:
        trainer.save_model(str(folder))
        save_judge_config(trainer.accelerator.unwrap_model(trainer.model), folder)
        images = ["curves.png"]
        plot_curves(trainer.state.log_history, folder / "curves.png", title="Reward model")
        if trainer.eval_dataset is not None:
            measured, table = measure_judge(trainer)
            metrics |= measured
            plot_reliability(table, folder / "reliability.png")
            images.append("reliability.png")
        leave_folder(
            folder,
            stage="reward",
            title="A judge of answers",
            parents={"model": model_config.model_name_or_path, "judgements": arguments.dataset_name},
            metrics=metrics,
            arguments=[arguments, model_config, training],
            images=images,
        )
    return folder


def load_judgements(arguments: RewardArguments, start: Start) -> "tuple[str, Any, Any | None]":
    """The kind of judge that the columns make, and the training and held-out rows, each checked."""
    train, test = load_train_and_test(arguments)
    choices = {"ranking": [PAIR], "classifier": [LABELLED]}.get(arguments.judge, [PAIR, LABELLED])
    kind = "ranking" if require_columns(train, *choices, role="the training split") == PAIR else "classifier"
    splits: list[Any] = []
    for dataset, name in ((train, "the training split"), (test, "the held-out split")):
        if dataset is not None and kind == "ranking":
            dataset = _check_pairs(dataset, train.column_names, arguments, start, name)
        elif dataset is not None:
            dataset = _check_labels(dataset, start, name)
        splits.append(dataset)
    return kind, splits[0], splits[1]


def _check_pairs(dataset: Any, present: list[str], arguments: RewardArguments, start: Start, name: str) -> Any:
    columns = [*(["prompt"] if "prompt" in present else []), *PAIR]
    require_columns(dataset, columns, role=name)
    dataset = dataset.select_columns(columns)
    require_texts(dataset, columns, start.tokenizer, name)
    if "prompt" not in columns:
        return dataset
    return fit_prompts(dataset, start.tokenizer, start.max_length, drop=arguments.drop_long_prompts, name=name)


def _check_labels(dataset: Any, start: Start, name: str) -> Any:
    require_columns(dataset, LABELLED, role=name)
    dataset = dataset.select_columns(list(LABELLED))
    require_texts(dataset, ["text"], start.tokenizer, name)
    labels = set(dataset["label"])
    if strange := [label for label in labels if label not in (0, 1)]:
        raise UserError(f"{name} has the label {strange[0]!r}; a classifier learns from 0 (bad) and 1 (good): map them")
    if len(labels) == 1:
        raise UserError(
            f"every label of {name} is {labels.pop()}, so there is nothing to tell apart; if the rows are sorted by "
            "label, leave out --max_train_samples and --max_test_samples or shuffle the file"
        )
    return dataset
