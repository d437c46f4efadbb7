"""A language model and demonstrations -> a model that answers, by supervised fine-tuning (Ouyang et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from trl import ModelConfig, SFTTrainer

from rlhf_recipes.core.arguments import DatasetArguments
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
from rlhf_recipes.folders import complete_output_folder
from rlhf_recipes.models import (
    StartingModel,
    build_lora_config,
    check_policy,
    is_quantized,
    load_causal_lm,
    prepare_for_lora,
    trainable_to_float32_,
)
from rlhf_recipes.reports import plot_curves
from rlhf_recipes.system import choose_precision, configure_cpu_runtime_
from rlhf_recipes.training import SafeTrainer, TrainingDefaults, measures, open_run, save_model, train, under_way

PROMPT_COMPLETION, MESSAGES = ("prompt", "completion"), ("messages",)
IGNORED = -100  # the label of a token without loss


@dataclass
class SFTArguments(DatasetArguments):
    """What demonstrations are learnt from. Their columns say which tokens carry loss.

    prompt and completion (text or messages): the completion; messages: every assistant turn; text: every token.
    """

    drop_long_prompts: bool = field(
        default=False, metadata={"help": "Leave out rows whose prompt fills max_length, rather than stop."}
    )


@dataclass
class SFTConfig(TrainingDefaults, trl.SFTConfig):
    """TRL's `SFTConfig`; lengths default to the model's context and the loss to the assistant's words."""

    output_dir: str = field(default="runs/sft", metadata={"help": "Folder to leave the model in."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest row in tokens; more is cut off. Unset: the model's context."}
    )
    assistant_only_loss: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Loss on assistant turns only. Unset: on where the rows are messages."}
    )
    eval_packing: bool | None = field(default=False, metadata={"help": "Pack held-out rows as well."})
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Token that pads, for a tokenizer without one (the released GPT-2: <|endoftext|>)."},
    )


class SafeSFTTrainer(SafeTrainer, SFTTrainer):
    """TRL's, whose runs lose nothing."""


def build_sft_trainer(arguments: SFTArguments, model_config: ModelConfig, training: SFTConfig) -> SFTTrainer:
    """Assemble the trainer. Everything that the caller can get wrong is found before weights are read."""
    from transformers import set_seed

    tokens: dict[str, Any] = {"eos_token": training.eos_token, "pad_token": training.pad_token}
    start = check_policy(model_config, training.max_length, **tokens, trust_remote_code=training.trust_remote_code)
    train, test = load_demonstrations(arguments, start, training.dataset_text_field)
    require_batch(len(train), training)
    require_held_out(test, training, arguments.dataset_test_split)
    if training.assistant_only_loss and not is_conversation((first_row(train) or {})[train.column_names[-1]]):
        raise UserError("assistant_only_loss is for rows of messages, and these are text; leave it out")
    training = choose_precision(training, start.config.hidden_size)
    configure_cpu_runtime_(training, start.config.hidden_size)
    training.max_length = start.max_length
    if training.assistant_only_loss is None:
        training.assistant_only_loss = train.column_names == list(MESSAGES)
    if training.assistant_only_loss:
        _require_markers(start)
    set_seed(training.seed)
    model = load_causal_lm(start.name, model_config, trust_remote_code=training.trust_remote_code)
    trainer = SafeSFTTrainer(
        model=prepare_for_lora(model, training.gradient_checkpointing),
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=start.tokenizer,
        peft_config=build_lora_config(model_config),
    )
    if is_quantized(model):
        trainable_to_float32_(trainer.model)
    require_batch(len(trainer.train_dataset), training, "after cutting and packing, the training split")
    return trainer


def run_sft(arguments: SFTArguments, model_config: ModelConfig, training: SFTConfig) -> Path:
    """Fine-tune and leave a folder with the model (or its LoRA adapter), its tokenizer and what was measured."""
    inputs = [model_config.model_name_or_path, arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    run = open_run(training, arguments, model_config, inputs=inputs)
    if run.finished:
        return run.folder
    trainer = build_sft_trainer(arguments, model_config, training)
    with under_way(trainer, run):
        metrics = train(trainer, run)
        save_model(trainer, run.folder)
        if trainer.eval_dataset is not None:
            metrics["eval_loss"] = trainer.evaluate()["eval_loss"]
        metrics |= _held_out(trainer) if measures(trainer) else {}
        if trainer.is_world_process_zero():
            trainer.save_state()
            plot_curves(trainer.state.log_history, run.folder / "curves.png", title="Supervised fine-tuning")
            complete_output_folder(
                run.folder,
                stage="sft",
                title="A model that answers",
                parents={"model": model_config.model_name_or_path, "demonstrations": arguments.dataset_name},
                metrics=metrics,
                arguments=[arguments, model_config, training],
                images=["curves.png"],
            )
    return run.folder


def load_demonstrations(
    arguments: SFTArguments, start: StartingModel, text_column: str = "text"
) -> "tuple[Any, Any | None]":
    """The training and held-out rows, in the columns that are learnt from, each row checked."""
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
                dataset, start.tokenizer, start.max_length, drop=arguments.drop_long_prompts, name=name
            )
        if "messages" in columns:
            _require_assistant(dataset, name)
        splits.append(dataset)
    return splits[0], splits[1]


def loss_spans(dataset: Any, beginning: Sequence[int] = ()) -> list[tuple[list[int], list[int]]]:
    """(ids before, ids with loss) of every unbroken run of tokens with loss, in rows of `input_ids` and `labels`.

    beginning: what the tokenizer puts before a text, and no model is asked for.
    """
    runs = []
    for row in dataset:
        ids, learnt = row["input_ids"], [label != IGNORED for label in row["labels"]]
        starts = [index for index in range(len(ids)) if learnt[index] and not (index and learnt[index - 1])]
        for start in starts:
            end = next((index for index in range(start, len(ids)) if not learnt[index]), len(ids))
            if start == 0 and ids[: len(beginning)] == list(beginning):
                start = len(beginning)
            runs.append((ids[:start], ids[start:end]))
    return runs


def _held_out(trainer: SFTTrainer) -> dict[str, float]:
    """Perplexity of the held-out words that are answered, or of all of a text; nothing without a held-out split."""
    if trainer.eval_dataset is None:
        return {}
    measured = completion_perplexity(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        loss_spans(trainer.eval_dataset, bos_prefix(trainer.processing_class)),
        batch_size=trainer.args.per_device_eval_batch_size,
        progress=True,
    )
    return {key: measured[key] for key in ("perplexity", "bits_per_byte", "loss")} | {
        "held_out_tokens": measured["tokens"]
    }


def _require_markers(start: StartingModel) -> None:
    """The chat template says which tokens are the assistant's, or is one for which TRL knows it."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        if not has_generation_markers(start.tokenizer.chat_template or ""):
            get_training_chat_template(start.tokenizer)
    except ValueError:
        raise UserError(
            f"the chat template of {start.name} does not mark what the assistant says with {{% generation %}}, "
            "so loss cannot be kept to it; add the marks to the template, or pass --assistant_only_loss false"
        ) from None


def _require_assistant(dataset: Any, name: str) -> None:
    for index, row in enumerate(dataset):
        if not any(message["role"] == "assistant" for message in row["messages"]):
            raise UserError(f"{name}, row {index}: no assistant turn to learn from; drop the row")
