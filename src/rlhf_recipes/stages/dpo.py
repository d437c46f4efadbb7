"""Direct preference optimisation (Rafailov et al. 2023): train a chat model on preferences, without a reward model.

DPO raises the log-probability of the chosen answer over that of the rejected one, relative to the model as it starts.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trl
from trl import DPOTrainer, ModelConfig

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    first_row,
    log_first_row,
    require_batch,
    require_held_out,
)
from rlhf_recipes.models import (
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
    ROWS,
    FineTuningDefaults,
    HeldOutMeans,
    Measured,
    SafeTrainer,
    SyncedReference,
    check_model_options,
    check_order_of_pairs,
    check_synced_reference,
    encode_dpo_pairs,
    learning_rate_field,
    load_pairs,
    mask_total,
    prepare_process_,
    run_training,
    training_inputs,
)

PANELS = [
    ("Loss (nats)", ["loss", "eval_loss"]),
    ("Pairs in the right order", ["rewards/accuracies", "eval_rewards/accuracies"]),
    ("Margin (beta x nats)", ["rewards/margins", "eval_rewards/margins"]),
    ("Implicit reward", ["rewards/chosen", "rewards/rejected"]),
    ("Log-probability of an answer", ["logps/chosen", "logps/rejected"]),
    ("Learning rate", ["learning_rate"]),
]
LOGGED = ("loss", "rewards/", "logps/", "logits/", "entropy", "mean_token_accuracy")  # by an evaluation
CHOICES = {
    "loss_type": (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    "truncation_mode": ("keep_start", "keep_end"),
    "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}  # fmt: skip
DIFFERENCE_LOSSES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
HELD_OUT_METRICS = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


@dataclass
class DPOArguments(RowLengthArguments):
    """Preferences: the columns prompt, chosen and rejected, all as text or all as messages."""


@dataclass
class DPOConfig(FineTuningDefaults, trl.DPOConfig):
    """TRL's `DPOConfig`; rows may be as long as the model's context."""

    unsupported = {"label_smoothing_factor": "has no effect: use label_smoothing, DPO's own"}
    usual_learning_rate = 1e-6
    learning_rate: float | None = learning_rate_field(1e-6)  # type: ignore[assignment]
    output_dir: str = field(default="runs/dpo", metadata={"help": "Output folder for the model."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt and answer in tokens; see too_long for longer ones. Unset: the model's context."
        },
    )


class SafeDPOTrainer(HeldOutMeans, SyncedReference, SafeTrainer, DPOTrainer):
    """TRL's `DPOTrainer` with the guarantees of `SafeTrainer`, for pairs that are tokenized already, too.

    Held-out means are over pairs, some over tokens.
    """

    kinds = {
        "entropy": "tokens",
        "logits/chosen": "chosen tokens",
        "logits/rejected": "rejected tokens",
        "mean_token_accuracy": "chosen tokens",
    }

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return tokenized pairs as they are; TRL tokenizes others."""
        tokenized = "prompt_ids" in (first_row(dataset) or {})
        return dataset if tokenized else super()._prepare_dataset(dataset, *args, **kwargs)

    def count_held_out(self, inputs: Any) -> dict[str, float]:
        chosen, rejected = map(mask_total, inputs["completion_mask"][..., 1:].chunk(2))
        counts = {"tokens": chosen + rejected, "chosen tokens": chosen, "rejected tokens": rejected}
        return {ROWS: len(inputs["completion_mask"]) / 2} | counts


def build_dpo_trainer(arguments: DPOArguments, model_config: ModelConfig, training: DPOConfig) -> DPOTrainer:
    """Build the trainer. Invalid options and rows raise a `UserError` before weights are loaded."""
    code: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    start = check_policy(model_config, training.max_length, pad_token=training.pad_token, **code)
    pairs = load_pairs(arguments, start)
    require_batch(len(pairs.train), training)
    require_held_out(pairs.test, training, arguments.dataset_test_split)
    check_model_options(training, model_config, start.config, LOGGED)
    check_loss_options(training)
    check_order_of_pairs(training)
    check_synced_reference(training, model_config.use_peft)
    if training.padding_free:
        refuse_packing(start.config, start.name)
    refuse_logits_unknown_to_trl(start.config, start.name)
    lora = build_lora_config(model_config, start.config, **code)
    encode = partial(encode_dpo_pairs, start=start, too_long=arguments.too_long or "drop", training=training)
    pairs = pairs.each_split(encode)
    require_batch(len(pairs.train), training, "after dropping rows, the training split")
    log_first_row([*pairs.train[0]["prompt_ids"], *pairs.train[0]["chosen_ids"]], start.tokenizer)
    training = prepare_process_(
        training, hidden_size_of(start.config), adapter=model_config.use_peft, max_length=start.max_length
    )
    model = load_causal_lm(start.name, model_config, **code)
    if training.padding_free:
        check_packing(model, start.name)
    # Without a reference model TRL loads one by the model's name, which for a LoRA folder is the name of its base.
    shares_reference = model_config.use_peft or training.precompute_ref_log_probs
    trainer = SafeDPOTrainer(
        model=prepare_for_lora_(model, training.gradient_checkpointing),
        ref_model=None if shares_reference else load_causal_lm(start.name, model_config, **code),
        args=training,
        train_dataset=pairs.train,
        eval_dataset=pairs.test,
        processing_class=start.tokenizer,
        peft_config=lora,
    )
    trainer.row_counts = pairs.counts
    if training.disable_dropout:  # TRL's own leaves rates that are plain numbers
        for module in (trainer.model, trainer.ref_model):
            disable_dropout_(module)
    check_fused_head(trainer.model, start.name)
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
        measure_before=lambda trainer: measure_dpo(trainer).metrics,
    )


def measure_dpo(trainer: SafeDPOTrainer, folder: Path | None = None) -> Measured:
    """Return loss, accuracy and margin on the test split, if there is one. All ranks must call it."""
    if trainer.eval_dataset is None:
        return Measured({})
    metrics = trainer.evaluate()
    return Measured({name: metrics[name] for name in HELD_OUT_METRICS})


def check_loss_options(training: DPOConfig) -> None:
    """Check the options of the loss, which TRL would refuse only once the model is loaded or the first batch is read.

    Raises:
        UserError: an unknown choice, or two options that do not go together.
    """
    for name, choices in CHOICES.items():
        values = getattr(training, name)
        for value in values if isinstance(values, list) else [values]:
            if value not in choices:
                raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    losses, weights = set(training.loss_type), training.loss_weights
    if weights is not None and len(weights) != len(training.loss_type):
        raise UserError(
            f"there are {len(training.loss_type)} loss_type and {len(weights)} loss_weights; give one weight each"
        )
    if training.f_divergence_type != "reverse_kl" and (others := sorted(losses - DIFFERENCE_LOSSES)):
        raise UserError(
            f"f_divergence_type {training.f_divergence_type} does not go with loss_type {others[0]}; leave it out"
        )
    if training.use_weighting and losses & {"aot", "aot_unpaired"}:
        raise UserError(
            "use_weighting does not go with the losses aot and aot_unpaired, which sort pairs; leave it out"
        )
    if "exo_pair" in losses and training.label_smoothing <= 0:
        raise UserError("loss_type exo_pair needs label_smoothing above 0; pass --label_smoothing 1e-3")
    if "robust" in losses and not 0 <= training.label_smoothing < 0.5:
        raise UserError(
            f"label_smoothing is {training.label_smoothing}; loss_type robust needs 0 up to, not including, 0.5"
        )
    if training.ld_alpha is not None and not 0 <= training.ld_alpha <= 1:
        raise UserError(f"ld_alpha is {training.ld_alpha}; give a share from 0 to 1")
