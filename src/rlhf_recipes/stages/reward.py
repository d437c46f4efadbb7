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
    build_lora_config,
    check_starting_model,
    load_reward_model,
    prepare_for_lora_,
    save_reward_model_config,
)
from rlhf_recipes.reports import plot_reliability
from rlhf_recipes.scoring import ModelReward, load_reward
from rlhf_recipes.training import (
    GREATEST,
    LEAST,
    NO_TEMPLATE_PATH,
    ClassifierTrainer,
    FineTuningDefaults,
    HeldOutMeans,
    Measured,
    SafeTrainer,
    check_model_options,
    check_order_of_pairs,
    encode_labelled_texts,
    learning_rate_field,
    measures_model,
    prepare_process_,
    require_causal,
    run_training,
    training_inputs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RewardType = Literal["auto", "ranking", "classifier"]
PAIR, LABELLED = ("chosen", "rejected"), ("text", "label")
LABELS = {"ranking": 1, "classifier": 2}
LOGGED = {  # by an evaluation
    "ranking": ("accuracy", "loss", "margin", "min_reward", "mean_reward", "max_reward"),
    "classifier": ("accuracy", "f1", "loss", "precision", "recall"),
}

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

    unsupported = NO_TEMPLATE_PATH | {"label_smoothing_factor": "has no effect: the loss compares scores"}
    usual_learning_rate = 1e-4
    learning_rate: float | None = learning_rate_field(1e-4)  # type: ignore[assignment]
    output_dir: str = field(default="runs/reward", metadata={"help": "Output folder for the reward model."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest row in tokens. Longer pairs are dropped, longer labelled texts are cut. "
            "Unset: the model's context."
        },
    )


class RankingTrainer(HeldOutMeans, SafeTrainer, RewardTrainer):
    """TRL's `RewardTrainer` with the guarantees of `SafeTrainer`. test_rows: the test split before it is tokenized."""

    kinds = {"min_reward": LEAST, "max_reward": GREATEST}

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
    require_causal(start.config, start.name)
    kind, train, test = load_reward_data(arguments, start)
    require_batch(len(train), training)
    require_held_out(test, training, arguments.dataset_test_split)
    check_model_options(training, model_config, start.config, LOGGED[kind])
    if kind == "ranking":
        check_order_of_pairs(training)
    elif training.center_rewards_coefficient is not None:
        raise UserError("center_rewards_coefficient has no effect on labelled texts; leave it out")
    shape: dict[str, Any] = {"adapter": model_config.use_peft, "max_length": start.max_length}
    training = prepare_process_(training, start.config.hidden_size, **shape)  # a new head is random
    model = load_reward_model(start.name, model_config, labels=LABELS[kind], **code)
    model.config.pad_token_id, model.config.eos_token_id = start.tokenizer.pad_token_id, start.tokenizer.eos_token_id
    model = prepare_for_lora_(model, training.gradient_checkpointing)
    if kind == "ranking":
        return _ranking_trainer(model, start, model_config, training, train, test)
    return _classifier_trainer(model, start, model_config, training, train, test)


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
        measure_before=lambda trainer: measure_held_out(trainer)[0],
    )


def measure_reward(trainer: RankingTrainer | ClassifierTrainer, folder: Path) -> Measured:
    """Return what the reward model is worth on held-out rows, and complete its config.json. All ranks must call it.

    The mean and spread of its scores go into config.json, where `normalize_rewards` of ppo reads them.
    """
    images: tuple[str, ...] = ()
    metrics, table = measure_held_out(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        if table:
            metrics["calibration_table"] = table
            model.config.score_mean, model.config.score_std = metrics["score_mean"], metrics["score_std"]
            plot_reliability(table, folder / "reliability.png")
            images = ("reliability.png",)
        save_reward_model_config(model, folder)
    return Measured(metrics, images)


def measure_held_out(trainer: RankingTrainer | ClassifierTrainer) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Return metrics on the test split, and the rows of the reliability plot. All ranks must call it."""
    metrics = {} if trainer.eval_dataset is None else {"eval_loss": trainer.evaluate()["eval_loss"]}
    if not metrics or not measures_model(trainer):
        return metrics, []
    measured, table = measure_reward_model(trainer)
    return metrics | measured, table


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
    model_config: ModelConfig,
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
        peft_config=build_lora_config(model_config, "SEQ_CLS"),
        test_rows=test,
    )
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
    model_config: ModelConfig,
    training: RewardConfig,
    train: Any,
    test: Any,
) -> ClassifierTrainer:
    from trl.trainer.utils import disable_dropout_in_model

    model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    lora = build_lora_config(model_config, "SEQ_CLS")
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    if training.disable_dropout:
        disable_dropout_in_model(model)
    encode = partial(encode_labelled_texts, tokenizer=start.tokenizer, max_length=start.max_length)
    return ClassifierTrainer(
        model=model,
        args=training,
        train_dataset=train.map(encode, batched=True, remove_columns=train.column_names, desc="Tokenizing"),
        eval_dataset=test and test.map(encode, batched=True, remove_columns=test.column_names, desc="Tokenizing"),
        processing_class=start.tokenizer,
        compute_metrics=compute_classification_metrics,
        test_rows=test,
    )


def measure_reward_model(
    trainer: RankingTrainer | ClassifierTrainer,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return metrics on the test split and the rows of the reliability plot."""
    tokenizer, max_length, test = trainer.processing_class, trainer.args.max_length, trainer.test_rows
    model = trainer.accelerator.unwrap_model(trainer.model)
    reward = load_reward(model, tokenizer, batch_size=trainer.args.per_device_eval_batch_size)
    if isinstance(reward, ModelReward):
        reward.progress = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    if isinstance(trainer, RankingTrainer):
        return measure_ranking(reward, test, tokenizer, max_length)
    encoded = encode_labelled_texts(test[:], tokenizer, max_length)
    return measure_classifier(reward, test["text"], encoded["input_ids"], encoded["labels"])
