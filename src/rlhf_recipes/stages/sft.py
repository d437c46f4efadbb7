"""Supervised fine-tuning (Ouyang et al. 2022): train a language model on demonstrations, so that it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from trl import ModelConfig, SFTTrainer

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    bos_prefix,
    first_row,
    is_conversation,
    keep_fitting_prompts,
    load_train_and_test,
    require_batch,
    require_columns,
    require_held_out,
    require_texts,
)
from rlhf_recipes.evaluation import completion_perplexity
from rlhf_recipes.models import (
    StartingModel,
    build_lora_config,
    check_fused_head,
    check_packing,
    check_policy,
    context_length,
    hidden_size_of,
    load_causal_lm,
    prepare_for_lora_,
    refuse_logits_unknown_to_trl,
    refuse_packing,
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
IGNORED_LABEL = -100  # of a token without loss


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
        default=None, metadata={"help": "Longest row in tokens; longer rows are cut. Unset: the model's context."}
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
    if training.assistant_only_loss and not is_conversation((first_row(train) or {})[train.column_names[-1]]):
        raise UserError("assistant_only_loss needs rows of messages, and these rows are text; leave it out")
    assistant_only = training.assistant_only_loss
    if assistant_only is None:
        assistant_only = train.column_names == list(MESSAGES)
    if assistant_only:
        _require_generation_markers(start)
    packs = training.packing or training.eval_packing or training.padding_free
    if packs:
        refuse_packing(start.config, start.name)
    refuse_logits_unknown_to_trl(start.config, start.name)
    lora = build_lora_config(model_config, start.config, **code)
    options = {"max_length": start.max_length, "assistant_only_loss": assistant_only}
    training = prepare_process_(training, hidden_size_of(start.config), **options)
    model = load_causal_lm(start.name, model_config, **code)
    if packs:
        check_packing(model, start.name)
    trainer = SafeSFTTrainer(
        model=prepare_for_lora_(model, training.gradient_checkpointing),
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=start.tokenizer,
        peft_config=lora,
    )
    check_fused_head(trainer.model, start.name)
    require_batch(len(trainer.train_dataset), training, "after cutting and packing, the training split")
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
    model = trainer.accelerator.unwrap_model(trainer.model)
    measured = completion_perplexity(
        model,
        trainer.processing_class,
        loss_spans(trainer.eval_dataset, bos_prefix(trainer.processing_class)),
        batch_size=trainer.args.per_device_eval_batch_size,
        max_length=None if context_length(model.config) else trainer.args.max_length,
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
        if dataset is None:
            splits.append(None)
            continue
        require_columns(dataset, columns, role=name)
        dataset = dataset.select_columns(columns)
        require_texts(dataset, columns, start.tokenizer, name)
        if "prompt" in columns:
            dataset = keep_fitting_prompts(
                dataset, start.tokenizer, start.max_length, drop=arguments.too_long == "drop", name=name
            )
        if "messages" in columns:
            _require_assistant(dataset, name)
        splits.append(dataset)
    return splits[0], splits[1]


def loss_spans(dataset: Any, prefix: Sequence[int] = ()) -> list[tuple[list[int], list[int]]]:
    """Return (ids before, ids with loss) of every unbroken span of tokens with loss.

    Args:
        dataset: rows of `input_ids` and `labels`, where the label -100 means no loss.
        prefix: ids that the tokenizer puts before a text; they are never measured.
    """
    spans = []
    for row in dataset:
        ids, has_loss = row["input_ids"], [label != IGNORED_LABEL for label in row["labels"]]
        starts = [index for index in range(len(ids)) if has_loss[index] and not (index and has_loss[index - 1])]
        for start in starts:
            end = next((index for index in range(start, len(ids)) if not has_loss[index]), len(ids))
            if start == 0 and ids[: len(prefix)] == list(prefix):
                start = len(prefix)
            spans.append((ids[:start], ids[start:end]))
    return spans


def _require_generation_markers(start: StartingModel) -> None:
    """Check that the chat template marks the assistant's tokens, or that TRL knows a marked version of it."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        if not has_generation_markers(start.tokenizer.chat_template or ""):
            get_training_chat_template(start.tokenizer)
    except ValueError:
        raise UserError(
            f"the chat template of {start.name} does not mark what the assistant says with {{% generation %}}, "
            "so loss cannot be limited to it; add the markers to the template, or pass --assistant_only_loss false"
        ) from None


def _require_assistant(dataset: Any, name: str) -> None:
    for index, row in enumerate(dataset):
        if not any(message["role"] == "assistant" for message in row["messages"]):
            raise UserError(f"{name}, row {index}: no assistant turn to learn from; drop the row")
