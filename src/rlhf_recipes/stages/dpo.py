"""A model that answers and preferences between answers -> a model that answers better, without a reward model between them.

Direct preference optimisation (Rafailov et al. 2023) raises the log-probability of the chosen answer over that of the
rejected one, relative to the model as it starts.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from trl import DPOTrainer, ModelConfig

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.data import check_and_fit_rows, load_train_and_test, require_batch, require_held_out
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
from rlhf_recipes.training import (
    SafeTrainer,
    TrainingDefaults,
    open_run,
    save_model,
    select_logged_panels,
    train,
    under_way,
)

COLUMNS = ("prompt", "chosen", "rejected")
CURVES = [
    ("Loss (nats)", ["loss", "eval_loss"]),
    ("Pairs in the right order", ["rewards/accuracies", "eval_rewards/accuracies"]),
    ("Margin (beta x nats)", ["rewards/margins", "eval_rewards/margins"]),
    ("Implicit reward", ["rewards/chosen", "rewards/rejected"]),
    ("Log-probability of an answer", ["logps/chosen", "logps/rejected"]),
    ("Learning rate", ["learning_rate"]),
]

logger = logging.getLogger(__name__)


@dataclass
class DPOArguments(DatasetArguments):
    """What is learnt from: the columns prompt, chosen and rejected, all as text or all as messages."""

    drop_long_prompts: bool = field(
        default=False, metadata={"help": "Leave out pairs whose prompt fills max_length, rather than stop."}
    )


@dataclass
class DPOConfig(TrainingDefaults, trl.DPOConfig):
    """TRL's `DPOConfig`; rows are as long as the model's context allows."""

    output_dir: str = field(default="runs/dpo", metadata={"help": "Folder to leave the model in."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt and answer in tokens; more is cut off. Unset: the model's context."},
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Token that pads, for a tokenizer without one (the released GPT-2: <|endoftext|>)."},
    )


class SafeDPOTrainer(SafeTrainer, DPOTrainer):
    """TRL's, whose runs lose nothing."""


def build_dpo_trainer(arguments: DPOArguments, model_config: ModelConfig, training: DPOConfig) -> DPOTrainer:
    """Assemble the trainer. Everything that the caller can get wrong is found before weights are read."""
    from transformers import set_seed

    start = check_policy(
        model_config, training.max_length, pad_token=training.pad_token, trust_remote_code=training.trust_remote_code
    )
    pairs, held_out = load_pairs(arguments, start)
    require_batch(len(pairs), training)
    require_held_out(held_out, training, arguments.dataset_test_split)
    training = choose_precision(training, start.config.hidden_size)
    configure_cpu_runtime_(training, start.config.hidden_size)
    training.max_length = start.max_length
    set_seed(training.seed)
    model = load_causal_lm(start.name, model_config, trust_remote_code=training.trust_remote_code)
    # Left to itself TRL reads the reference by the model's name, which for a LoRA folder is that of its base.
    shared = model_config.use_peft or training.precompute_ref_log_probs
    trainer = SafeDPOTrainer(
        model=prepare_for_lora(model, training.gradient_checkpointing),
        ref_model=None
        if shared
        else load_causal_lm(start.name, model_config, trust_remote_code=training.trust_remote_code),
        args=training,
        train_dataset=pairs,
        eval_dataset=held_out,
        processing_class=start.tokenizer,
        peft_config=build_lora_config(model_config),
    )
    if is_quantized(model):
        trainable_to_float32_(trainer.model)
    _warn_of_cut_answers(trainer.train_dataset, training.max_length)
    return trainer


def run_dpo(arguments: DPOArguments, model_config: ModelConfig, training: DPOConfig) -> Path:
    """Train and leave a folder with the model (or its LoRA adapter), its tokenizer and what was measured."""
    inputs = [model_config.model_name_or_path, arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    run = open_run(training, arguments, model_config, inputs=inputs)
    if run.finished:
        return run.folder
    trainer = build_dpo_trainer(arguments, model_config, training)
    with under_way(trainer, run):
        metrics = train(trainer, run)
        save_model(trainer, run.folder)
        if trainer.eval_dataset is not None:
            measured = trainer.evaluate()
            metrics |= {
                name: measured[name] for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
            }
        if trainer.is_world_process_zero():
            trainer.save_state()
            log = trainer.state.log_history
            plot_curves(
                log,
                run.folder / "curves.png",
                select_logged_panels(CURVES, log),
                title="Direct preference optimisation",
            )
            complete_output_folder(
                run.folder,
                stage="dpo",
                title="A model that answers as people prefer",
                parents={"model": model_config.model_name_or_path, "preferences": arguments.dataset_name},
                metrics=metrics,
                arguments=[arguments, model_config, training],
                images=["curves.png"],
            )
    return run.folder


def load_pairs(arguments: DPOArguments, start: StartingModel) -> "tuple[Any, Any | None]":
    """The training and held-out pairs, each checked."""

    def checked(rows: Any, name: str) -> Any:
        drop = arguments.drop_long_prompts
        return rows and check_and_fit_rows(rows, COLUMNS, start.tokenizer, start.max_length, drop=drop, name=name)

    train_rows, test_rows = load_train_and_test(arguments)
    return checked(train_rows, "the training split"), checked(test_rows, "the held-out split")


def _warn_of_cut_answers(pairs: Any, limit: int | None) -> None:
    """An answer that is cut ends without its EOS, and where the two differ may be what is cut off."""
    sizes = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs]
    cut = sum(limit is not None and size > limit for size in sizes)
    if cut:
        logger.warning(
            "%d of %d pairs are longer than %s tokens and are cut off; shorten them, or raise --max_length up to the "
            "model's context", cut, len(sizes), limit,
        )  # fmt: skip
