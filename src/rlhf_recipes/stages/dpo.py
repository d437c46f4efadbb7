"""Direct preference optimisation (Rafailov et al. 2023): train a chat model on preferences, without a reward model.

DPO raises the log-probability of the chosen answer over that of the rejected one, relative to the model as it starts.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from trl import DPOTrainer, ModelConfig

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.data import check_and_fit_rows, load_train_and_test, require_batch, require_held_out
from rlhf_recipes.models import (
    StartingModel,
    build_lora_config,
    check_fused_head,
    check_packing,
    check_policy,
    disable_dropout_,
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
    prepare_process_,
    run_training,
    training_inputs,
)

COLUMNS = ("prompt", "chosen", "rejected")
PANELS = [
    ("Loss (nats)", ["loss", "eval_loss"]),
    ("Pairs in the right order", ["rewards/accuracies", "eval_rewards/accuracies"]),
    ("Margin (beta x nats)", ["rewards/margins", "eval_rewards/margins"]),
    ("Implicit reward", ["rewards/chosen", "rewards/rejected"]),
    ("Log-probability of an answer", ["logps/chosen", "logps/rejected"]),
    ("Learning rate", ["learning_rate"]),
]
HELD_OUT_METRICS = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")

logger = logging.getLogger(__name__)


@dataclass
class DPOArguments(RowLengthArguments):
    """Preferences: the columns prompt, chosen and rejected, all as text or all as messages."""


@dataclass
class DPOConfig(FineTuningDefaults, trl.DPOConfig):
    """TRL's `DPOConfig`; rows may be as long as the model's context."""

    output_dir: str = field(default="runs/dpo", metadata={"help": "Output folder for the model."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt and answer in tokens; longer rows are cut. Unset: the model's context."},
    )


class SafeDPOTrainer(SafeTrainer, DPOTrainer):
    """TRL's `DPOTrainer` with the guarantees of `SafeTrainer`."""


def build_dpo_trainer(arguments: DPOArguments, model_config: ModelConfig, training: DPOConfig) -> DPOTrainer:
    """Build the trainer. Invalid options and rows raise a `UserError` before weights are loaded."""
    code: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    start = check_policy(model_config, training.max_length, pad_token=training.pad_token, **code)
    pairs, test_pairs = load_pairs(arguments, start)
    require_batch(len(pairs), training)
    require_held_out(test_pairs, training, arguments.dataset_test_split)
    if training.padding_free:
        refuse_packing(start.config, start.name)
    refuse_logits_unknown_to_trl(start.config, start.name)
    lora = build_lora_config(model_config, start.config, **code)
    training = prepare_process_(training, hidden_size_of(start.config), max_length=start.max_length)
    model = load_causal_lm(start.name, model_config, **code)
    if training.padding_free:
        check_packing(model, start.name)
    # Without a reference model TRL loads one by the model's name, which for a LoRA folder is the name of its base.
    shares_reference = model_config.use_peft or training.precompute_ref_log_probs
    trainer = SafeDPOTrainer(
        model=prepare_for_lora_(model, training.gradient_checkpointing),
        ref_model=None if shares_reference else load_causal_lm(start.name, model_config, **code),
        args=training,
        train_dataset=pairs,
        eval_dataset=test_pairs,
        processing_class=start.tokenizer,
        peft_config=lora,
    )
    if training.disable_dropout:  # TRL's own leaves rates that are plain numbers
        for module in (trainer.model, trainer.ref_model):
            disable_dropout_(module)
    check_fused_head(trainer.model, start.name)
    _warn_of_cut_answers(trainer.train_dataset, training.max_length)
    return trainer


def run_dpo(arguments: DPOArguments, model_config: ModelConfig, training: DPOConfig) -> Path:
    """Train and leave a folder with the model (or its LoRA adapter), its tokenizer and its metrics."""
    return run_training(
        "dpo",
        [arguments, model_config, training],
        lambda: build_dpo_trainer(arguments, model_config, training),
        measure_dpo,
        title="A model that answers as people prefer",
        parents={"model": model_config.model_name_or_path, "preferences": arguments.dataset_name},
        inputs=training_inputs(model_config, arguments),
        plot_title="Direct preference optimisation",
        panels=PANELS,
    )


def measure_dpo(trainer: SafeDPOTrainer, folder: Path) -> Measured:
    """Return loss, accuracy and margin on the test split, if there is one. All ranks must call it."""
    if trainer.eval_dataset is None:
        return Measured({})
    metrics = trainer.evaluate()
    return Measured({name: metrics[name] for name in HELD_OUT_METRICS})


def load_pairs(arguments: DPOArguments, start: StartingModel) -> "tuple[Any, Any | None]":
    """Load the training and the test pairs and check each row."""

    def checked(rows: Any, name: str) -> Any:
        drop = arguments.too_long == "drop"
        return rows and check_and_fit_rows(rows, COLUMNS, start.tokenizer, start.max_length, drop=drop, name=name)

    train_rows, test_rows = load_train_and_test(arguments)
    return checked(train_rows, "the training split"), checked(test_rows, "the held-out split")


def _warn_of_cut_answers(pairs: Any, limit: int | None) -> None:
    """Warn where answers are cut: they lose their EOS, and perhaps the only tokens in which the two answers differ."""
    sizes = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs]
    cut = sum(limit is not None and size > limit for size in sizes)
    if cut:
        logger.warning(
            "%d of %d pairs are longer than %s tokens and are cut off; shorten them, or raise --max_length up to the "
            "model's context", cut, len(sizes), limit,
        )  # fmt: skip
