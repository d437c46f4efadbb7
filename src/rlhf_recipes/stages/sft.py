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
    bos_prefix,
    log_first_row,
    require_batch,
    require_held_out,
)
from rlhf_recipes.evaluation import completion_perplexity
from rlhf_recipes.models import (
    build_lora_config,
    check_fused_head,
    check_packing,
    check_policy,
    context_length,
    disable_dropout_,
    hidden_size_of,
    load_causal_lm,
    prepare_for_lora_,
    refuse_logits_unknown_to_trl,
    refuse_packing,
)
from rlhf_recipes.training import (
    NO_TEMPLATE_PATH,
    FineTuningDefaults,
    HeldOutMeans,
    Measured,
    SafeTrainer,
    check_model_options,
    encode_demonstrations,
    learning_rate_field,
    load_demonstrations,
    loss_spans,
    mask_total,
    measures_model,
    prepare_process_,
    run_training,
    training_inputs,
)

LOGGED = ("loss", "mean_token_accuracy", "entropy")  # by an evaluation
CHOICES = {  # the first is the default
    "loss_type": ("nll", "dft", "chunked_nll"),
    "truncation_mode": ("keep_start", "keep_end"),
    "packing_strategy": ("bfd", "bfd_split", "wrapped"),
}


@dataclass
class SFTArguments(RowLengthArguments):
    """Demonstrations. Their columns decide which tokens have loss.

    prompt and completion (text or messages): the completion; messages: every assistant turn; text: every token.
    """


@dataclass
class SFTConfig(FineTuningDefaults, trl.SFTConfig):
    """TRL's `SFTConfig`; the length defaults to the model's context, and messages have loss on assistant turns only."""

    unsupported = NO_TEMPLATE_PATH | {"dataset_kwargs": "has no effect: rows are always prepared"}
    usual_learning_rate = 2e-5
    learning_rate: float | None = learning_rate_field(2e-5)  # type: ignore[assignment]
    output_dir: str = field(default="runs/sft", metadata={"help": "Output folder for the model."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens; see too_long for longer ones. Unset: the model's context."},
    )
    assistant_only_loss: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Loss on assistant turns only. Unset: on where the rows are messages."}
    )
    disable_dropout: bool = field(
        default=False,
        metadata={"help": "Turn off the dropout that the model's config asks for, as dpo, reward and ppo do."},
    )
    eval_packing: bool | None = field(default=False, metadata={"help": "Pack held-out rows as well."})


class SafeSFTTrainer(HeldOutMeans, SafeTrainer, SFTTrainer):
    """TRL's `SFTTrainer` with the guarantees of `SafeTrainer`; held-out means are over tokens with loss."""

    kinds = dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), "tokens")

    def count_held_out(self, inputs: Any) -> dict[str, float]:
        tokens = mask_total(inputs["labels"][..., 1:] != NO_LOSS)
        return super().count_held_out(inputs) | {"tokens": tokens}


def build_sft_trainer(arguments: SFTArguments, model_config: ModelConfig, training: SFTConfig) -> SFTTrainer:
    """Build the trainer. Invalid options and rows raise a `UserError` before weights are loaded."""
    tokens: dict[str, Any] = {"eos_token": training.eos_token, "pad_token": training.pad_token}
    code: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    start = check_policy(model_config, training.max_length, **tokens, **code)
    rows = load_demonstrations(arguments, start, training.dataset_text_field)
    check_loss_options(training, rows.train.column_names)
    require_batch(len(rows.train), training)
    require_held_out(rows.test, training, arguments.dataset_test_split)
    check_model_options(training, model_config, start.config, LOGGED)
    packs = training.packing or training.eval_packing or training.padding_free
    if packs:
        refuse_packing(start.config, start.name)
    refuse_logits_unknown_to_trl(start.config, start.name)
    lora = build_lora_config(model_config, start.config, **code)
    encode = partial(encode_demonstrations, start=start, too_long=arguments.too_long or "drop", training=training)
    rows = rows.each_split(encode)
    require_batch(len(rows.train), training, "after dropping rows, the training split")
    log_first_row(rows.train[0]["input_ids"], start.tokenizer)
    # The labels of the rows say which tokens have loss.
    options: dict[str, Any] = {"max_length": start.max_length, "assistant_only_loss": False}
    training = prepare_process_(training, hidden_size_of(start.config), adapter=model_config.use_peft, **options)
    model = load_causal_lm(start.name, model_config, **code)
    if packs:
        check_packing(model, start.name)
    if training.disable_dropout:
        disable_dropout_(model)
    trainer = SafeSFTTrainer(
        model=prepare_for_lora_(model, training.gradient_checkpointing),
        args=training,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=start.tokenizer,
        peft_config=lora,
    )
    trainer.row_counts = rows.counts
    check_fused_head(trainer.model, start.name)
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
        measure_before=lambda trainer: measure_sft(trainer).metrics,
    )


def measure_sft(trainer: SafeSFTTrainer, folder: Path | None = None) -> Measured:
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


def check_loss_options(training: SFTConfig, columns: Sequence[str]) -> None:
    """Check the options that TRL would refuse only once the model is loaded, or would ignore.

    Raises:
        UserError: an unknown choice, or two options that do not go together.
    """
    for name, choices in CHOICES.items():
        if (value := getattr(training, name, choices[0])) not in choices:
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    if training.padding_free and not training.packing:
        raise UserError("padding_free does not cut rows to max_length without packing; add --packing true")
    if training.completion_only_loss and "prompt" not in columns:
        raise UserError(
            f"completion_only_loss needs the columns prompt and completion; these rows have {', '.join(columns)}"
        )
    if training.label_smoothing_factor and training.loss_type != "nll":
        raise UserError(
            f"label_smoothing_factor has no effect with loss_type {training.loss_type}; leave one of them out"
        )
