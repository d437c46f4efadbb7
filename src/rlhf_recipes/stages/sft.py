"""Supervised fine-tuning (Ouyang et al. 2022): train a language model on demonstrations, so that it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trl
from trl import ModelConfig, SFTTrainer

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    NO_LOSS,
    RowCounts,
    bos_prefix,
    check_rows,
    drop_rows,
    encode_demonstration,
    encode_rows,
    encode_splits,
    first_row,
    fit_rows,
    is_conversation,
    is_empty_answer,
    load_train_and_test,
    require_assistant_spans,
    require_batch,
    require_columns,
    require_held_out,
    require_turn_end,
)
from rlhf_recipes.evaluation import completion_perplexity
from rlhf_recipes.models import (
    StartingModel,
    build_lora_config,
    check_policy,
    load_causal_lm,
    prepare_for_lora_,
    saved_eos_ids,
)
from rlhf_recipes.training import (
    FineTuningDefaults,
    Measured,
    SafeTrainer,
    measures_model,
    prepare_process_,
    run_training,
    training_inputs,
)

PROMPT_COMPLETION, MESSAGES = ("prompt", "completion"), ("messages",)


@dataclass
class SFTArguments(RowLengthArguments):
    """Demonstrations. Their columns decide which tokens have loss.

    prompt and completion (text or messages): the completion; messages: every assistant turn; text: every token.
    """


@dataclass
class SFTConfig(FineTuningDefaults, trl.SFTConfig):
    """TRL's `SFTConfig`; the length defaults to the model's context, and messages have loss on assistant turns only."""

    output_dir: str = field(default="runs/sft", metadata={"help": "Output folder for the model."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens; see too_long for longer ones. Unset: the model's context."},
    )
    assistant_only_loss: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Loss on assistant turns only. Unset: on where the rows are messages."}
    )
    eval_packing: bool | None = field(default=False, metadata={"help": "Pack held-out rows as well."})


class SafeSFTTrainer(SafeTrainer, SFTTrainer):
    """TRL's `SFTTrainer` with the guarantees of `SafeTrainer`."""


def build_sft_trainer(arguments: SFTArguments, model_config: ModelConfig, training: SFTConfig) -> SFTTrainer:
    """Build the trainer. Invalid options and rows raise a `UserError` before weights are loaded."""
    tokens: dict[str, Any] = {"eos_token": training.eos_token, "pad_token": training.pad_token}
    code: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    start = check_policy(model_config, training.max_length, **tokens, **code)
    train, test = load_demonstrations(arguments, start, training.dataset_text_field)
    require_batch(len(train), training)
    require_held_out(test, training, arguments.dataset_test_split)
    encode = partial(encode_demonstrations, start=start, too_long=arguments.too_long or "drop", training=training)
    train, test, counts = encode_splits(train, test, encode)
    require_batch(len(train), training, "after dropping rows, the training split")
    options = {"max_length": start.max_length, "assistant_only_loss": False}  # the labels of the rows say it
    training = prepare_process_(training, start.config.hidden_size, **options)
    model = load_causal_lm(start.name, model_config, **code)
    trainer = SafeSFTTrainer(
        model=prepare_for_lora_(model, training.gradient_checkpointing),
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=start.tokenizer,
        peft_config=build_lora_config(model_config),
    )
    trainer.row_counts = counts
    require_batch(len(trainer.train_dataset), training, "after packing, the training split")
    return trainer


def run_sft(arguments: SFTArguments, model_config: ModelConfig, training: SFTConfig) -> Path:
    """Fine-tune and leave a folder with the model (or its LoRA adapter), its tokenizer and its metrics."""
    return run_training(
        "sft",
        [arguments, model_config, training],
        lambda: build_sft_trainer(arguments, model_config, training),
        measure_sft,
        title="A model that answers",
        parents={"model": model_config.model_name_or_path, "demonstrations": arguments.dataset_name},
        inputs=training_inputs(model_config, arguments),
        plot_title="Supervised fine-tuning",
    )


def measure_sft(trainer: SafeSFTTrainer, folder: Path) -> Measured:
    """Return the loss on the test split, and perplexity and bits per byte of its tokens with loss. All ranks must call it."""
    if trainer.eval_dataset is None:
        return Measured({})
    metrics = {"eval_loss": trainer.evaluate()["eval_loss"]}
    if not measures_model(trainer):
        return Measured(metrics)
    measured = completion_perplexity(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        loss_spans(trainer.eval_dataset, bos_prefix(trainer.processing_class)),
        batch_size=trainer.args.per_device_eval_batch_size,
        progress=True,
    )
    metrics |= {key: measured[key] for key in ("perplexity", "bits_per_byte", "loss")}
    return Measured(metrics | {"held_out_tokens": measured["tokens"]})


def load_demonstrations(
    arguments: SFTArguments, start: StartingModel, text_column: str = "text"
) -> "tuple[Any, Any | None]":
    """Load the training and the test rows with the columns that are used, and check each row."""
    train, test = load_train_and_test(arguments)
    columns = list(require_columns(train, PROMPT_COMPLETION, MESSAGES, (text_column,), role="the training split"))
    splits: list[Any] = []
    for dataset, name in ((train, "the training split"), (test, "the held-out split")):
        rows = dataset and check_rows(dataset, columns, start.tokenizer, name)
        if rows is not None and "messages" in columns:
            _require_assistant(rows, name)
        splits.append(rows)
    return splits[0], splits[1]


def encode_demonstrations(
    rows: Any, counts: RowCounts, start: StartingModel, too_long: str, training: SFTConfig
) -> Any:
    """Tokenize demonstrations to `input_ids` and `labels`, and drop or cut those that are too long.

    Raises:
        UserError: a chat template that does not show what the assistant says, or ends it with a token at which nothing
            stops; assistant_only_loss for rows of text; no row is left.
    """
    first = first_row(rows) or {}
    chat = is_conversation(first.get("messages") or first.get("completion"))
    if training.assistant_only_loss and not chat:
        raise UserError("assistant_only_loss needs rows of messages, and these rows are text; leave it out")
    assistant_only = training.assistant_only_loss
    if assistant_only is None:
        assistant_only = "messages" in first
    if chat:
        _require_stop(start)
    if assistant_only:
        turns = first.get("messages") or [*first["prompt"], *first["completion"]]
        require_assistant_spans(start.tokenizer, turns, start.name)
    encode = partial(
        encode_demonstration,
        tokenizer=start.tokenizer,
        text_column=training.dataset_text_field,
        assistant_only=assistant_only,
        completion_only=training.completion_only_loss is not False,
    )
    encoded = encode_rows(rows, encode, training.dataset_num_proc)
    keep_end = getattr(training, "truncation_mode", "keep_start") == "keep_end"
    encoded = fit_rows(encoded, start.max_length, too_long, counts, keep_end=keep_end)
    advice = "leave them out of the dataset"

    def trained(row: Any) -> list[int]:
        return [label for label in row["labels"] if label != NO_LOSS]

    encoded = drop_rows(
        encoded, lambda row: not trained(row), counts, "without_loss", "have no token with loss", advice
    )
    encoded = drop_rows(
        encoded,
        lambda row: is_empty_answer(trained(row), start.tokenizer),
        counts, "empty_answers", "have an empty answer", advice,
    )  # fmt: skip
    return encoded


def loss_spans(dataset: Any, prefix: Sequence[int] = ()) -> list[tuple[list[int], list[int]]]:
    """Return (ids before, ids with loss) of every unbroken span of tokens with loss.

    Args:
        dataset: rows of `input_ids` and `labels`, where the label -100 means no loss.
        prefix: ids that the tokenizer puts before a text; they are never measured.
    """
    spans = []
    for row in dataset:
        ids, has_loss = row["input_ids"], [label != NO_LOSS for label in row["labels"]]
        starts = [index for index in range(len(ids)) if has_loss[index] and not (index and has_loss[index - 1])]
        for start in starts:
            end = next((index for index in range(start, len(ids)) if not has_loss[index]), len(ids))
            if start == 0 and ids[: len(prefix)] == list(prefix):
                start = len(prefix)
            spans.append((ids[:start], ids[start:end]))
    return spans


def _require_stop(start: StartingModel) -> None:
    """Check that generation stops at the token with which the chat template ends an answer."""
    end = require_turn_end(start.tokenizer, start.name)
    stops = {start.tokenizer.eos_token_id, *saved_eos_ids(start.name, start.config)}
    if end.id not in stops:
        raise UserError(
            f"the chat template of {start.name} ends an answer with {end.token}, but generation stops at "
            f'{start.tokenizer.eos_token}, so no answer would end; pass --eos_token "{end.token}"'
        )


def _require_assistant(dataset: Any, name: str) -> None:
    for index, row in enumerate(dataset):
        if not any(message["role"] == "assistant" for message in row["messages"]):
            raise UserError(f"{name}, row {index}: no assistant turn to learn from; drop the row")
