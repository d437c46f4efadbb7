"""Train a reward model, which scores answers, on preferences or on labels. There are two types:

- ranking: pairs of a chosen and a rejected answer, a score each (Bradley-Terry; Stiennon et al. 2020);
- classifier: texts labelled 1 (good) or 0 (bad), whose log-odds are the score (as for sentiment, Ziegler et al. 2019).
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import trl
from trl import ModelConfig, RewardTrainer

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    keep_fitting_prompts,
    load_train_and_test,
    require_batch,
    require_columns,
    require_held_out,
    require_texts,
)
from rlhf_recipes.evaluation import compute_classification_metrics, measure_classifier, measure_ranking
from rlhf_recipes.models import (
    StartingModel,
    attach_adapter,
    build_lora_config,
    check_starting_model,
    disable_dropout_,
    hidden_size_of,
    load_reward_model,
    prepare_for_lora_,
    refuse_encoder,
    save_reward_model_config,
    text_config,
)
from rlhf_recipes.reports import plot_reliability
from rlhf_recipes.scoring import load_reward
from rlhf_recipes.training import (
    FineTuningDefaults,
    Measured,
    SafeTrainer,
    collate_labelled_texts,
    encode_labelled_texts,
    mean_cross_entropy,
    measures_model,
    prepare_process_,
    run_training,
    training_inputs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RewardType = Literal["auto", "ranking", "classifier"]
PAIR, LABELLED = ("chosen", "rejected"), ("text", "label")
LABELS = {"ranking": 1, "classifier": 2}

logger = logging.getLogger(__name__)


@dataclass
class RewardArguments(RowLengthArguments):
    """Preferences (chosen, rejected, optionally prompt) or labelled texts (text, label)."""

    reward_type: RewardType = field(
        default="auto",
        metadata={
            "help": "ranking trains on the columns chosen and rejected, classifier on text and label "
            "(1 good, 0 bad); auto decides by the columns of the dataset."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_type not in get_args(RewardType):
            raise UserError(
                f"unknown reward_type {self.reward_type!r}; choose one of {', '.join(get_args(RewardType))}"
            )


@dataclass
class RewardConfig(FineTuningDefaults, trl.RewardConfig):
    """TRL's `RewardConfig` for both types; rows may be as long as the model's context."""

    output_dir: str = field(default="runs/reward", metadata={"help": "Output folder for the reward model."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest row in tokens. Longer pairs are dropped, longer labelled texts are cut. "
            "Unset: the model's context."
        },
    )


class RankingTrainer(SafeTrainer, RewardTrainer):
    """TRL's `RewardTrainer` with the guarantees of `SafeTrainer`. test_rows: the test split before it is tokenized."""

    def __init__(self, *args: Any, test_rows: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.test_rows = test_rows


class ClassifierTrainer(SafeTrainer):
    """`SafeTrainer` for texts with labels. test_rows: the test split before it is tokenized."""

    def __init__(self, *args: Any, test_rows: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.test_rows = test_rows


def build_reward_trainer(
    arguments: RewardArguments, model_config: ModelConfig, training: RewardConfig
) -> RankingTrainer | ClassifierTrainer:
    """Build the trainer. Invalid options and rows raise a `UserError` before weights are loaded."""
    tokens: dict[str, Any] = {"eos_token": training.eos_token, "pad_token": training.pad_token}
    code: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    start = check_starting_model(model_config, training.max_length, **tokens, **code)
    refuse_encoder(start.config, start.tokenizer, start.name, **code)
    kind, train, test = load_reward_data(arguments, start)
    require_batch(len(train), training)
    require_held_out(test, training, arguments.dataset_test_split)
    lora = build_lora_config(model_config, start.config, "SEQ_CLS", **code)
    # Seeds first: a new head is random.
    training = prepare_process_(training, hidden_size_of(start.config), max_length=start.max_length)
    model = load_reward_model(start.name, model_config, labels=LABELS[kind], **code)
    for config in (model.config, text_config(model.config)):  # transformers reads the pad id of the text config
        config.pad_token_id, config.eos_token_id = start.tokenizer.pad_token_id, start.tokenizer.eos_token_id
    model = prepare_for_lora_(model, training.gradient_checkpointing)
    if kind == "ranking":
        return _ranking_trainer(model, start, lora, training, train, test)
    return _classifier_trainer(model, start, lora, training, train, test)


def run_reward(arguments: RewardArguments, model_config: ModelConfig, training: RewardConfig) -> Path:
    """Train a reward model and leave a folder that ppo takes as it is, with its metrics on held-out rows."""
    return run_training(
        "reward",
        [arguments, model_config, training],
        lambda: build_reward_trainer(arguments, model_config, training),
        measure_reward,
        title="A reward model",
        parents={"model": model_config.model_name_or_path, "preferences or labels": arguments.dataset_name},
        inputs=training_inputs(model_config, arguments),
        plot_title="Reward model",
    )


def measure_reward(trainer: RankingTrainer | ClassifierTrainer, folder: Path) -> Measured:
    """Return what the reward model is worth on held-out rows, and complete its config.json. All ranks must call it.

    The mean and spread of its scores go into config.json, where `normalize_rewards` of ppo reads them.
    """
    metrics: dict[str, Any] = {}
    images: tuple[str, ...] = ()
    if trainer.eval_dataset is not None:
        metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.eval_dataset is not None and measures_model(trainer):
        measured, table = measure_reward_model(trainer)
        metrics |= measured | {"calibration_table": table}
        if trainer.is_world_process_zero():
            model.config.score_mean, model.config.score_std = measured["score_mean"], measured["score_std"]
            plot_reliability(table, folder / "reliability.png")
            images = ("reliability.png",)
    if trainer.is_world_process_zero():
        save_reward_model_config(model, folder)
    return Measured(metrics, images)


def load_reward_data(arguments: RewardArguments, start: StartingModel) -> "tuple[str, Any, Any | None]":
    """Return the type that the columns decide, and the training and test rows, each row checked."""
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
        dataset, start.tokenizer, start.max_length, drop=arguments.too_long == "drop", name=name
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
    lora: Any,
    training: RewardConfig,
    train: Any,
    test: Any,
) -> RankingTrainer:
    trainer = RankingTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=start.tokenizer,
        peft_config=lora,
        test_rows=test,
    )
    if training.disable_dropout:  # TRL's own leaves rates that are plain numbers
        disable_dropout_(trainer.model)
    for rows, kept, name in ((train, trainer.train_dataset, "training"), (test, trainer.eval_dataset, "held-out")):
        if rows is not None and len(kept) < len(rows):
            logger.warning(
                "%d of %d %s pairs are longer than %s tokens and are dropped",
                len(rows) - len(kept), len(rows), name, training.max_length,
            )  # fmt: skip
    require_batch(len(trainer.train_dataset), training, "without the pairs that are too long, the training split")
    if test is not None and not len(trainer.eval_dataset):
        raise UserError(f"every held-out pair is longer than {training.max_length} tokens; raise --max_length")
    return trainer


def _classifier_trainer(
    model: "PreTrainedModel",
    start: StartingModel,
    lora: Any,
    training: RewardConfig,
    train: Any,
    test: Any,
) -> ClassifierTrainer:
    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    if lora is not None:
        model = attach_adapter(model, lora)
    if training.disable_dropout:
        disable_dropout_(model)
    encode = partial(encode_labelled_texts, tokenizer=start.tokenizer, max_length=start.max_length)
    return ClassifierTrainer(
        model=model,
        args=training,
        train_dataset=train.map(encode, batched=True, remove_columns=train.column_names, desc="Tokenizing"),
        eval_dataset=test and test.map(encode, batched=True, remove_columns=test.column_names, desc="Tokenizing"),
        data_collator=partial(collate_labelled_texts, pad_id=start.tokenizer.pad_token_id),
        processing_class=start.tokenizer,
        compute_metrics=compute_classification_metrics,
        compute_loss_func=mean_cross_entropy,
        test_rows=test,
    )


def measure_reward_model(
    trainer: RankingTrainer | ClassifierTrainer,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return metrics on the test split and the rows of the reliability plot."""
    tokenizer, max_length, test = trainer.processing_class, trainer.args.max_length, trainer.test_rows
    model = trainer.accelerator.unwrap_model(trainer.model)
    reward = load_reward(model, tokenizer, batch_size=trainer.args.per_device_eval_batch_size)
    if isinstance(trainer, RankingTrainer):
        return measure_ranking(reward, test, tokenizer, max_length)
    encoded = encode_labelled_texts(test[:], tokenizer, max_length)
    return measure_classifier(reward, test["text"], encoded["input_ids"], encoded["labels"])
