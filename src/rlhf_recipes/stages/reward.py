"""Preferences or labels -> a reward model that scores answers. Two kinds behind one door:

- ranking: pairs of a chosen and a rejected answer, a score each (Bradley-Terry; Stiennon et al. 2020);
- classifier: texts labelled 1 (good) or 0 (bad), whose log-odds are the score (as for sentiment, Ziegler et al. 2019).
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import trl
from transformers import EvalPrediction, Trainer
from trl import ModelConfig, RewardTrainer

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    keep_fitting_prompts,
    load_train_and_test,
    prompt_and_completion_ids,
    require_batch,
    require_columns,
    require_held_out,
    require_texts,
)
from rlhf_recipes.evaluation import calibration_table, compute_classification_metrics, preference_metrics
from rlhf_recipes.folders import complete_output_folder
from rlhf_recipes.models import (
    StartingModel,
    build_lora_config,
    check_starting_model,
    is_quantized,
    load_reward_model,
    prepare_for_lora,
    save_reward_model_config,
    trainable_to_float32_,
)
from rlhf_recipes.reports import plot_curves, plot_reliability
from rlhf_recipes.scoring import Reward, load_reward
from rlhf_recipes.system import choose_precision, configure_cpu_runtime_
from rlhf_recipes.training import (
    SafeTrainer,
    TrainingDefaults,
    collate_labelled_texts,
    encode_labelled_texts,
    mean_cross_entropy,
    measures,
    open_run,
    save_model,
    train,
    under_way,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RewardType = Literal["auto", "ranking", "classifier"]
PAIR, LABELLED = ("chosen", "rejected"), ("text", "label")
LABELS = {"ranking": 1, "classifier": 2}

logger = logging.getLogger(__name__)


@dataclass
class RewardArguments(DatasetArguments):
    """What the reward model learns from: pairs (chosen, rejected and, if there is one, prompt) or labels (text, label)."""

    reward_type: RewardType = field(
        default="auto",
        metadata={
            "help": "ranking learns from the columns chosen and rejected, classifier from text and label "
            "(1 good, 0 bad); auto goes by the columns there are."
        },
    )
    drop_long_prompts: bool = field(
        default=False, metadata={"help": "Leave out pairs whose prompt fills max_length, rather than stop."}
    )

    def __post_init__(self) -> None:
        if self.reward_type not in get_args(RewardType):
            raise UserError(
                f"unknown reward_type {self.reward_type!r}; choose one of {', '.join(get_args(RewardType))}"
            )


@dataclass
class RewardConfig(TrainingDefaults, trl.RewardConfig):
    """TRL's `RewardConfig`, for both kinds of reward model; rows are as long as the model's context allows."""

    output_dir: str = field(default="runs/reward", metadata={"help": "Folder to leave the reward model in."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest row in tokens. Longer pairs are left out, longer labelled texts are cut. "
            "Unset: the model's context."
        },
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Token that pads, for a tokenizer without one (the released GPT-2: <|endoftext|>)."},
    )


class SafeRewardTrainer(SafeTrainer, RewardTrainer):
    """TRL's, whose runs lose nothing."""


def build_reward_trainer(
    arguments: RewardArguments, model_config: ModelConfig, training: RewardConfig
) -> RewardTrainer | Trainer:
    """Assemble the trainer. Everything that the caller can get wrong is found before weights are read."""
    from transformers import set_seed

    tokens: dict[str, Any] = {"eos_token": training.eos_token, "pad_token": training.pad_token}
    start = check_starting_model(
        model_config, training.max_length, **tokens, trust_remote_code=training.trust_remote_code
    )
    kind, train, test = load_reward_data(arguments, start)
    require_batch(len(train), training)
    require_held_out(test, training, arguments.dataset_test_split)
    training = choose_precision(training, start.config.hidden_size)
    configure_cpu_runtime_(training, start.config.hidden_size)
    training.max_length = start.max_length
    set_seed(training.seed)  # a new head is drawn at random
    model = load_reward_model(
        start.name, model_config, labels=LABELS[kind], trust_remote_code=training.trust_remote_code
    )
    model.config.pad_token_id, model.config.eos_token_id = start.tokenizer.pad_token_id, start.tokenizer.eos_token_id
    model = prepare_for_lora(model, training.gradient_checkpointing)
    build = _ranking_trainer if kind == "ranking" else _classifier_trainer
    trainer: Any = build(model, start, model_config, training, train, test)
    trainer.judged = test  # as text, which its own rows are no more
    if is_quantized(model):
        trainable_to_float32_(trainer.model)
    return trainer


def run_reward(arguments: RewardArguments, model_config: ModelConfig, training: RewardConfig) -> Path:
    """Train a reward model and leave a folder that ppo takes as it is, with what the reward model is worth on held-out rows."""
    inputs = [model_config.model_name_or_path, arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    run = open_run(training, arguments, model_config, inputs=inputs)
    if run.finished:
        return run.folder
    trainer: Any = build_reward_trainer(arguments, model_config, training)
    with under_way(trainer, run):
        metrics = train(trainer, run)
        save_model(trainer, run.folder)
        if trainer.eval_dataset is not None:
            metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
        measured: dict[str, float] = {}
        table: list[dict[str, float]] = []
        if trainer.eval_dataset is not None and measures(trainer):
            measured, table = measure_reward_model(trainer, trainer.judged)
        if trainer.is_world_process_zero():
            reward_model = trainer.accelerator.unwrap_model(trainer.model)
            save_reward_model_config(reward_model, run.folder)
            images = ["curves.png"]
            trainer.save_state()
            plot_curves(trainer.state.log_history, run.folder / "curves.png", title="Reward model")
            if measured:
                metrics |= measured | {"calibration_table": table}
                reward_model.config.score_mean, reward_model.config.score_std = (
                    measured["score_mean"],
                    measured["score_std"],
                )
                save_reward_model_config(reward_model, run.folder)
                plot_reliability(table, run.folder / "reliability.png")
                images.append("reliability.png")
            complete_output_folder(
                run.folder,
                stage="reward",
                title="A reward model of answers",
                parents={"model": model_config.model_name_or_path, "judgements": arguments.dataset_name},
                metrics=metrics,
                arguments=[arguments, model_config, training],
                images=images,
            )
    return run.folder


def load_reward_data(arguments: RewardArguments, start: StartingModel) -> "tuple[str, Any, Any | None]":
    """The kind of reward model that the columns make, and the training and held-out rows, each checked."""
    train, test = load_train_and_test(arguments)
    choices = {"ranking": [PAIR], "classifier": [LABELLED]}.get(arguments.reward_type, [PAIR, LABELLED])
    kind = "ranking" if require_columns(train, *choices, role="the training split") == PAIR else "classifier"
    splits: list[Any] = []
    for dataset, name in ((train, "the training split"), (test, "the held-out split")):
        if dataset is not None and kind == "ranking":
            dataset = _check_pairs(dataset, train.column_names, arguments, start, name)
        elif dataset is not None:
            dataset = _check_labels(dataset, start, name)
        splits.append(dataset)
    return kind, splits[0], splits[1]


def _check_pairs(dataset: Any, present: list[str], arguments: RewardArguments, start: StartingModel, name: str) -> Any:
    columns = [*(["prompt"] if "prompt" in present else []), *PAIR]
    require_columns(dataset, columns, role=name)
    dataset = dataset.select_columns(columns)
    require_texts(dataset, columns, start.tokenizer, name)
    if "prompt" not in columns:
        return dataset
    return keep_fitting_prompts(
        dataset, start.tokenizer, start.max_length, drop=arguments.drop_long_prompts, name=name
    )


def _check_labels(dataset: Any, start: StartingModel, name: str) -> Any:
    require_columns(dataset, LABELLED, role=name)
    dataset = dataset.select_columns(list(LABELLED))
    require_texts(dataset, ["text"], start.tokenizer, name)
    labels = set(dataset["label"])
    if strange := [label for label in labels if label not in (0, 1)]:
        raise UserError(f"{name} has the label {strange[0]!r}; a classifier learns from 0 (bad) and 1 (good)")
    if len(labels) == 1:
        raise UserError(
            f"every label of {name} is {labels.pop()}, so there is nothing to tell apart; if the rows are sorted by "
            "label, leave out --max_train_samples and --max_test_samples or shuffle the file"
        )
    return dataset


def _ranking_trainer(
    model: "PreTrainedModel",
    start: StartingModel,
    model_config: ModelConfig,
    training: RewardConfig,
    train: Any,
    test: Any,
) -> RewardTrainer:
    trainer = SafeRewardTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=start.tokenizer,
        peft_config=build_lora_config(model_config, "SEQ_CLS"),
    )
    for rows, kept, name in ((train, trainer.train_dataset, "training"), (test, trainer.eval_dataset, "held-out")):
        if rows is not None and len(kept) < len(rows):
            logger.warning(
                "%d of %d %s pairs are longer than %s tokens and are left out",
                len(rows) - len(kept), len(rows), name, training.max_length,
            )  # fmt: skip
    require_batch(len(trainer.train_dataset), training, "without the pairs that are too long, the training split")
    if test is not None and not len(trainer.eval_dataset):
        raise UserError(f"every held-out pair is longer than {training.max_length} tokens; raise --max_length")
    return trainer


def _classifier_trainer(
    model: "PreTrainedModel",
    start: StartingModel,
    model_config: ModelConfig,
    training: RewardConfig,
    train: Any,
    test: Any,
) -> Trainer:
    from trl.trainer.utils import disable_dropout_in_model

    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    adapters = build_lora_config(model_config, "SEQ_CLS")
    if adapters is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapters)
    if training.disable_dropout:
        disable_dropout_in_model(model)
    encode = partial(encode_labelled_texts, tokenizer=start.tokenizer, max_length=start.max_length)
    return SafeTrainer(
        model=model,
        args=training,
        train_dataset=train.map(encode, batched=True, remove_columns=train.column_names, desc="Tokenizing"),
        eval_dataset=test and test.map(encode, batched=True, remove_columns=test.column_names, desc="Tokenizing"),
        data_collator=partial(collate_labelled_texts, pad_id=start.tokenizer.pad_token_id),
        processing_class=start.tokenizer,
        compute_metrics=compute_classification_metrics,
        compute_loss_func=mean_cross_entropy,
    )


def measure_reward_model(
    trainer: RewardTrainer | Trainer, test: Any
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Metrics on held-out rows and the rows of their reliability plot, from scores as ppo asks for them."""
    tokenizer, limit = trainer.processing_class, trainer.args.max_length
    model = trainer.accelerator.unwrap_model(trainer.model)
    reward_model = load_reward(model, tokenizer, batch_size=trainer.args.per_device_eval_batch_size)
    if isinstance(trainer, RewardTrainer):
        return _measure_pairs(reward_model, test, tokenizer, limit)
    encoded = encode_labelled_texts(test[:], tokenizer, limit)
    labels = np.array(encoded["labels"])
    rows = encoded["input_ids"]
    scores = reward_model([""] * len(rows), test["text"], prompt_ids=[[]] * len(rows), completion_ids=rows)
    metrics = compute_classification_metrics(EvalPrediction(np.array(scores), labels))
    # The right label against the wrong one is a pair as well; its margin are the log-odds of the right one.
    margins, zeros = np.where(labels == 1, scores, np.negative(scores)).tolist(), [0] * len(rows)
    paired = preference_metrics(margins, zeros, zeros, zeros)
    kept = {key: paired[key] for key in ("margin", "calibration_error", "brier")}
    metrics |= {"reward_accuracy": metrics["accuracy"]} | kept | _spread(scores)
    return metrics, calibration_table(margins, zeros)


def _spread(scores: list[float]) -> dict[str, float]:
    return {"score_mean": float(np.mean(scores)), "score_std": float(np.std(scores))}


def _measure_pairs(
    reward_model: Reward, test: Any, tokenizer: "PreTrainedTokenizerBase", limit: int | None
) -> tuple[dict[str, float], list[dict[str, float]]]:
    def fits(pair: list[tuple[list[int], list[int]]]) -> bool:
        return limit is None or all(len(prompt) + len(answer) <= limit for prompt, answer in pair)

    rows = [
        (row, [prompt_and_completion_ids(row.get("prompt", ""), row[side], tokenizer) for side in PAIR])
        for row in test
    ]
    rows = [(row, pair) for row, pair in rows if fits(pair)]
    scores: list[list[float]] = []
    lengths: list[list[int]] = []
    for index, side in enumerate(PAIR):
        ids = [pair[index] for _, pair in rows]
        prompts, answers = [row.get("prompt", "") for row, _ in rows], [row[side] for row, _ in rows]
        scores.append(
            reward_model(prompts, answers, prompt_ids=[i[0] for i in ids], completion_ids=[i[1] for i in ids])
        )
        lengths.append([len(answer) for _, answer in ids])
    measured = preference_metrics(scores[0], scores[1], lengths[0], lengths[1])
    metrics = {"reward_accuracy": measured.pop("accuracy"), **measured, "pairs": len(rows)} | _spread(
        [*scores[0], *scores[1]]
    )
    return metrics, calibration_table(scores[0], scores[1])
