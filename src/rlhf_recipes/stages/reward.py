"""Train a reward model, which scores answers, on preferences or on labels. There are two types:

- ranking: pairs of a chosen and a rejected answer, a score each (Bradley-Terry; Stiennon et al. 2020);
- classifier: texts labelled 1 (good) or 0 (bad), whose log-odds are the score (as for sentiment, Ziegler et al. 2019).
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import trl
from trl import ModelConfig, RewardTrainer

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    PREFERENCE,
    log_first_row,
    require_batch,
    require_held_out,
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
    encode_labels,
    encode_pairs,
    learning_rate_field,
    load_reward_rows,
    measures_model,
    prepare_process_,
    run_training,
    training_inputs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RewardType = Literal["auto", "ranking", "classifier"]
LABELS = {"ranking": 1, "classifier": 2}
LOGGED = {  # by an evaluation
    "ranking": ("accuracy", "loss", "margin", "min_reward", "mean_reward", "max_reward"),
    "classifier": ("accuracy", "f1", "loss", "precision", "recall"),
}


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
    positive_label: list[str] | None = field(
        default=None, metadata={"help": "Labels that are good; all others are bad. Unset: known from their names."}
    )
    label_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Labels that are numbers are good from here on, such as 4 of 5 stars; in a column named toxicity, spam "
            "or the like they are bad from here on."
        },
    )
    score_margin: bool = field(
        default=False,
        metadata={"help": "Ranked answers: the difference of two scores is the margin of their pair in the loss."},
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
        metadata={"help": "Longest row in tokens; see too_long for longer ones. Unset: the model's context."},
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
    refuse_encoder(start.config, start.tokenizer, start.name, **code)
    rows = load_reward_rows(arguments, start)
    kind, encode = ("ranking", encode_pairs) if rows.form == PREFERENCE else ("classifier", encode_labels)
    require_batch(len(rows.train), training)
    require_held_out(rows.test, training, arguments.dataset_test_split)
    check_model_options(training, model_config, start.config, LOGGED[kind])
    if kind == "ranking":
        check_order_of_pairs(training)
    elif training.center_rewards_coefficient is not None:
        raise UserError("center_rewards_coefficient has no effect on labelled texts; leave it out")
    lora = build_lora_config(model_config, start.config, "SEQ_CLS", **code)
    rows = rows.each_split(partial(encode, start=start, too_long=arguments.too_long, training=training))
    require_batch(len(rows.train), training, "after dropping rows, the training split")
    log_first_row(rows.train[0]["chosen_ids" if kind == "ranking" else "input_ids"], start.tokenizer)
    shape: dict[str, Any] = {"adapter": model_config.use_peft, "max_length": start.max_length}
    training = prepare_process_(training, hidden_size_of(start.config), **shape)  # a new head is random
    model = load_reward_model(start.name, model_config, labels=LABELS[kind], **code)
    for config in (model.config, text_config(model.config)):  # transformers reads the pad id of the text config
        config.pad_token_id, config.eos_token_id = start.tokenizer.pad_token_id, start.tokenizer.eos_token_id
    model = prepare_for_lora_(model, training.gradient_checkpointing)
    make = _ranking_trainer if kind == "ranking" else _classifier_trainer
    trainer = make(model, start, lora, training, rows.train, rows.test)
    trainer.row_counts = rows.counts
    if training.disable_dropout:  # TRL's own leaves rates that are plain numbers
        disable_dropout_(trainer.model)
    return trainer


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


def _ranking_trainer(
    model: "PreTrainedModel",
    start: StartingModel,
    lora: Any,
    training: RewardConfig,
    train: Any,
    test: Any,
) -> RankingTrainer:
    return RankingTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=start.tokenizer,
        peft_config=lora,
        test_rows=test,
    )


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
    return ClassifierTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=start.tokenizer,
        compute_metrics=compute_classification_metrics,
    )


def measure_reward_model(
    trainer: RankingTrainer | ClassifierTrainer,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return metrics on the test split and the rows of the reliability plot."""
    tokenizer = trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    reward = load_reward(model, tokenizer, batch_size=trainer.args.per_device_eval_batch_size)
    texts = partial(tokenizer.batch_decode, skip_special_tokens=True)
    if isinstance(reward, ModelReward):
        reward.progress = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    if isinstance(trainer, RankingTrainer):
        return measure_ranking(reward, trainer.test_rows, texts)
    ids = trainer.eval_dataset["input_ids"][:]
    return measure_classifier(reward, texts(ids), ids, trainer.eval_dataset["labels"][:])
