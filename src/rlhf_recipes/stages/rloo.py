"""REINFORCE leave-one-out (RLOO; Ahmadian et al. 2024): reinforce a chat model against rewards, without a value model.

RLOO samples several answers to a prompt. The advantage of an answer is its score minus the mean score of the other answers. The
KL penalty is part of the score, as in ppo.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trl
from trl import ModelConfig, RLOOTrainer

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import world_size
from rlhf_recipes.data import (
    PROMPT,
    FormOptions,
    LoadedRows,
    load_rows,
    prompts_by_split,
    require_held_out,
    require_texts,
)
from rlhf_recipes.generation import check_turn_end, reset_generation_config_, stop_ids
from rlhf_recipes.models import (
    StartingModel,
    build_lora_config,
    check_fused_head,
    check_left_padding,
    check_policy,
    context_length,
    count_positions_from_mask_,
    disable_dropout_,
    hidden_size_of,
    load_causal_lm,
    prepare_for_lora_,
    refuse_left_padding,
    refuse_logits_unknown_to_trl,
    saved_eos_ids,
)
from rlhf_recipes.scoring import check_reward, load_trl_reward_functions, missing_eos
from rlhf_recipes.training import (
    UNSUPPORTED_BY_RLOO,
    FineTuningDefaults,
    Measured,
    OwnTokenization,
    RewardedPromptsArguments,
    SafeTrainer,
    SampledBatches,
    SyncedReference,
    check_model_options,
    check_sampling,
    check_synced_reference,
    learning_rate_field,
    prepare_process_,
    run_training,
    training_inputs,
)

PANELS = [
    ("Score", ["reward", "eval_reward"]),
    ("KL to the reference (nats per token)", ["kl", "eval_kl"]),
    ("Answer length (tokens)", ["completions/mean_length", "eval_completions/mean_length"]),
    ("Not ended by a stop token", ["completions/clipped_ratio", "eval_completions/clipped_ratio"]),
    ("Entropy (nats per token)", ["entropy"]),
    ("Ratio clipped", ["clip_ratio/region_mean"]),
    ("Prompts whose answers all score the same", ["frac_reward_zero_std"]),
    ("Learning rate", ["learning_rate"]),
]
LOGGED = ("reward", "rewards/", "reward_std", "kl", "entropy", "completions/", "frac_reward_zero_std", "loss")
USELESS = {"loss": "is 0 in every evaluation, whose answers are compared with one another"}


@dataclass
class RLOOArguments(RewardedPromptsArguments):
    """Prompts (column `prompt`: text or messages) and the rewards of their answers."""


@dataclass
class RLOOConfig(FineTuningDefaults, trl.RLOOConfig):
    """TRL's `RLOOConfig` with the answer length and the reward options of ppo.

    A batch has ``per_device_train_batch_size x steps_per_generation x world size`` answers, ``num_generations`` for each
    prompt; each answer is trained on ``num_iterations`` times.
    """

    unsupported = UNSUPPORTED_BY_RLOO
    best_metric = "eval_reward"
    usual_learning_rate = 1e-6
    learning_rate: float | None = learning_rate_field(1e-6)  # type: ignore[assignment]
    output_dir: str = field(default="runs/rloo", metadata={"help": "Output folder for the model."})
    eval_before_training: bool = field(
        default=False, metadata={"help": "Answer held-out prompts before the first step too (<name>_before)."}
    )
    num_generations: int = field(
        default=4, metadata={"help": "Answers sampled to a prompt, each compared with the others; divides the batch."}
    )
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Answers sampled to a held-out prompt; divides the evaluation batch."}
    )
    max_completion_length: int = field(default=53, metadata={"help": "Longest answer in tokens."})
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Turn dropout off, so that answers are sampled and trained with the same probabilities."},
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtract this from the score of an answer that no stop token ended."}
    )
    normalize_rewards: bool = field(
        default=False,
        metadata={
            "help": "Shift and scale each reward model's scores to mean 0 and variance 1 over its own held-out rows."
        },
    )

    def __post_init__(self) -> None:
        self.split_global_batch_(world_size())
        compared = self.num_generations_eval or self.num_generations
        if self.num_generations < 2:
            raise UserError(
                f"num_generations is {self.num_generations}; an answer is compared with others; give 2 or more"
            )
        if self.answers % self.num_generations:
            raise UserError(
                f"num_generations {self.num_generations} does not divide the {self.answers} answers of a batch "
                "(per_device_train_batch_size x steps_per_generation x processes); change one of them"
            )
        if self.per_device_eval_batch_size % compared:
            raise UserError(
                f"num_generations_eval {compared} does not divide the {self.per_device_eval_batch_size} answers of an "
                "evaluation batch (per_device_eval_batch_size); change one of them"
            )
        check_sampling(self)
        super().__post_init__()
        if self.accelerator_config.dispatch_batches:
            raise UserError(
                "dispatch_batches cannot share out prompts, which are text; leave it out of accelerator_config"
            )

    @property
    def answers(self) -> int:
        """The number of answers in one batch, over all processes."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        return self.generation_batch_size or self.per_device_train_batch_size * world_size() * steps

    def episodes(self, steps: int) -> int:
        """Return the number of answers sampled in this many optimizer steps."""
        uses = (self.steps_per_generation or 1) * self.num_iterations
        return math.ceil(steps * self.gradient_accumulation_steps / uses) * self.answers


class SafeRLOOTrainer(SampledBatches, OwnTokenization, SyncedReference, SafeTrainer, RLOOTrainer):
    """TRL's `RLOOTrainer` with the guarantees of `SafeTrainer`. It reads prompts, and decodes answers, as ppo does."""


def build_rloo_trainer(arguments: RLOOArguments, model_config: ModelConfig, training: RLOOConfig) -> RLOOTrainer:
    """Build the trainer. Invalid options and rows raise a `UserError` before weights are loaded."""
    code: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    start = check_policy(model_config, None, pad_token=training.pad_token, **code)
    rows = load_prompts(arguments, start, training)
    require_held_out(rows.test, training, arguments.dataset_test_split)
    check_model_options(training, model_config, start.config, LOGGED, USELESS)
    check_synced_reference(training, model_config.use_peft)
    sources = check_rewards(arguments, training, rows.train.column_names)
    refuse_left_padding(start.config, start.name)
    refuse_logits_unknown_to_trl(start.config, start.name)
    lora = build_lora_config(model_config, start.config, **code)
    context = context_length(start.config)
    limit = None if context is None else context - training.max_completion_length
    frozen = arguments.frozen_model_kwargs(model_config)
    functions = load_trl_reward_functions(
        sources, start.tokenizer, training.device, training.normalize_rewards, max_prompt_tokens=limit, **frozen
    )
    training = prepare_process_(training, hidden_size_of(start.config), adapter=model_config.use_peft)
    model = load_causal_lm(start.name, model_config, **code)
    check_left_padding(model, start.name, start.tokenizer.pad_token_id)
    stops = {start.tokenizer.eos_token_id, *stop_ids(model, start.tokenizer)}
    reset_generation_config_(model, stops)
    if training.missing_eos_penalty is not None:
        functions.append(missing_eos(training.missing_eos_penalty, stops))
        if (weights := training.reward_weights) is not None:
            training = copy.copy(training)
            training.reward_weights = [*weights, 1.0]
    trainer = SafeRLOOTrainer(
        model=prepare_for_lora_(model, training.gradient_checkpointing),
        reward_funcs=functions,
        args=training,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        processing_class=start.tokenizer,
        peft_config=lora,
        max_prompt_tokens=limit,
    )
    trainer.row_counts = rows.counts
    check_fused_head(trainer.model, start.name, training.temperature)
    if trainer.ref_model is not None and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        # TRL loads the reference by the model's name, which for a LoRA folder is the name of its base.
        trainer.ref_model.load_state_dict(trainer.model.state_dict())
    for module in (trainer.model, trainer.ref_model):
        count_positions_from_mask_(module)
        if training.disable_dropout:  # TRL's own leaves rates that are plain numbers
            disable_dropout_(module)
    return trainer


def run_rloo(arguments: RLOOArguments, model_config: ModelConfig, training: RLOOConfig) -> Path:
    """Train and leave a folder with the model (or its LoRA adapter), its tokenizer and its metrics."""
    return run_training(
        "rloo",
        [arguments, model_config, training],
        lambda: build_rloo_trainer(arguments, model_config, training),
        measure_rloo,
        title="A model that answers better",
        parents={
            "model": model_config.model_name_or_path,
            "reward": ", ".join(arguments.reward or []),
            "prompts": arguments.dataset_name,
        },
        inputs=training_inputs(model_config, arguments, *(arguments.reward or [])),
        plot_title="RLOO",
        panels=PANELS,
        measure_before=held_out_metrics,
    )


def measure_rloo(trainer: SafeRLOOTrainer, folder: Path) -> Measured:
    """Return the metrics of the first and last batch of answers and of the held-out prompts. All ranks must call it."""
    metrics: dict[str, Any] = {"episodes": trainer.args.episodes(trainer.state.global_step)}
    return Measured(metrics | rloo_metrics(trainer.state.log_history) | held_out_metrics(trainer))


def held_out_metrics(trainer: SafeRLOOTrainer) -> dict[str, float]:
    """Return the metrics of the answers to the held-out prompts, under ppo's names. All ranks must call it."""
    logged = trainer.evaluate() if trainer.eval_dataset is not None else {}
    rewards = {name: value for name, value in logged.items() if name.startswith("eval_rewards/")}
    return answer_metrics(logged, "eval_") | rewards


def load_prompts(arguments: RLOOArguments, start: StartingModel, training: RLOOConfig) -> LoadedRows:
    """Load the training and test prompts, check that each fits, and count their rows; long ones are cut when tokenized."""
    rows = load_rows(arguments, FormOptions((PROMPT,), tokenizer=start.tokenizer))
    for dataset, counts in zip((rows.train, rows.test), rows.counts.values(), strict=False):
        require_texts(dataset, ["prompt"], start.tokenizer, counts.name)
    stops = saved_eos_ids(start.name, start.config)
    check_turn_end(rows.train[0]["prompt"], start.tokenizer, stops, start.name)
    room = (context_length(start.config), training.max_completion_length)
    train, test = prompts_by_split(rows, start.tokenizer, room, arguments.too_long)
    prompts = rows.train.select_columns(["prompt", *train.columns]).select(train.kept)
    held_out: Any = None
    if rows.test is not None and test is not None:
        held_out = rows.test.select_columns(["prompt", *test.columns]).select(test.kept)
    needed = training.answers // training.num_generations
    if len(prompts) < needed:
        raise UserError(
            f"the training split has {len(prompts)} prompts, fewer than the {needed} of one batch "
            "(per_device_train_batch_size x steps_per_generation x processes / num_generations); lower the batch"
        )
    return replace(rows, train=prompts, test=held_out)


def check_rewards(arguments: RLOOArguments, training: RLOOConfig, columns: list[str]) -> list[str]:
    """Check every reward against the columns of the prompts, and return their sources."""
    if not (sources := list(arguments.reward or [])):
        raise UserError("no reward; pass --reward with a reward model's folder or package.module:function")
    for source in sources:
        check_reward(source, [name for name in columns if name != "prompt"])
    weights = training.reward_weights
    if weights is not None and len(weights) != len(sources):
        raise UserError(f"there are {len(sources)} rewards and {len(weights)} reward_weights; give one weight each")
    return sources


def rloo_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Return score, KL, length and EOS share of the first and the last logged batch of answers, under ppo's names."""
    updates = [entry for entry in log_history if "reward" in entry]
    if not updates:
        return {}
    before = {f"{name}_before": value for name, value in answer_metrics(updates[0]).items()}
    return before | answer_metrics(updates[-1])


def answer_metrics(entry: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Convert what TRL logs of a batch of answers to ppo's names and units: KL in nats per answer, share that ended."""
    if f"{prefix}reward" not in entry:
        return {}
    length = entry[f"{prefix}completions/mean_length"]
    per_token = entry.get(f"{prefix}kl")  # None where every answer was left out
    kl = {} if per_token is None else {f"{prefix}kl": per_token * length}
    ended = 1.0 - entry[f"{prefix}completions/clipped_ratio"]
    return {f"{prefix}score": entry[f"{prefix}reward"]} | kl | {f"{prefix}length": length, f"{prefix}eos_share": ended}
