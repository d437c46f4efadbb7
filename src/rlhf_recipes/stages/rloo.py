"""A model that answers, something that scores answers, and prompts -> a model that answers better, by RLOO.

REINFORCE leave-one-out (Ahmadian et al. 2024) samples several answers to a prompt; what an answer is worth is its score
less the mean score of the others. There is no value model, and the KL penalty is a part of the score, as in ppo.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trl
from trl import ModelConfig, RLOOTrainer

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import world_size
from rlhf_recipes.data import Prompts, load_train_and_test, require_columns, require_held_out, require_texts
from rlhf_recipes.folders import complete_output_folder
from rlhf_recipes.generation import stop_ids
from rlhf_recipes.models import (
    FrozenQuantizationArguments,
    StartingModel,
    build_lora_config,
    check_policy,
    context_length,
    count_positions_from_mask_,
    is_quantized,
    load_causal_lm,
    prepare_for_lora,
    trainable_to_float32_,
)
from rlhf_recipes.reports import plot_curves
from rlhf_recipes.scoring import check_reward, load_trl_reward_functions, missing_eos
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CURVES = [
    ("Score", ["reward", "eval_reward"]),
    ("KL to the reference (nats a token)", ["kl", "eval_kl"]),
    ("Answer length (tokens)", ["completions/mean_length", "eval_completions/mean_length"]),
    ("Not ended by a stop token", ["completions/clipped_ratio", "eval_completions/clipped_ratio"]),
    ("Entropy (nats a token)", ["entropy"]),
    ("Ratio clipped", ["clip_ratio/region_mean"]),
    ("Prompts whose answers all score the same", ["frac_reward_zero_std"]),
    ("Learning rate", ["learning_rate"]),
]


@dataclass
class RLOOArguments(DatasetArguments, FrozenQuantizationArguments):
    """Prompts (column `prompt`: text or messages) and what scores their answers."""

    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "What scores answers: reward models' folders or Hub ids, or package.module:function; several add up."
        },
    )


@dataclass
class RLOOConfig(TrainingDefaults, trl.RLOOConfig):
    """TRL's `RLOOConfig`, with the house's answer length and the ways of ppo with scores.

    A batch holds ``per_device_train_batch_size x steps_per_generation x processes`` answers, ``num_generations`` to a
    prompt; each is learnt from ``num_iterations`` times.
    """

    output_dir: str = field(default="runs/rloo", metadata={"help": "Folder to leave the model in."})
    num_generations: int = field(
        default=4, metadata={"help": "Answers sampled to a prompt, each compared with the others; divides the batch."}
    )
    num_generations_eval: int | None = field(
        default=1, metadata={"help": "Answers sampled to a held-out prompt; divides the evaluation batch."}
    )
    max_completion_length: int = field(default=53, metadata={"help": "Longest answer in tokens."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Answers are sampled and learnt from by the same probabilities."}
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
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Token that pads, for a tokenizer without one (the released GPT-2: <|endoftext|>)."},
    )

    def __post_init__(self) -> None:
        self.split_global_batch_(world_size())
        evaluated = self.per_device_eval_batch_size * world_size()
        compared = self.num_generations_eval or self.num_generations
        if self.num_generations < 2:
            raise UserError(
                f"num_generations is {self.num_generations}; an answer is compared with others: give 2 or more"
            )
        if self.answers % self.num_generations:
            raise UserError(
                f"num_generations {self.num_generations} does not divide the {self.answers} answers of a batch "
                "(per_device_train_batch_size x steps_per_generation x processes); change one of them"
            )
        if evaluated % compared:
            raise UserError(
                f"num_generations_eval {compared} does not divide the {evaluated} answers of an evaluation batch "
                "(per_device_eval_batch_size x processes); change one of them"
            )
        if self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature}; it must be above 0, since RLOO learns from what it samples"
            )
        if self.max_completion_length < 1:
            raise UserError(f"max_completion_length is {self.max_completion_length}; it must be at least 1")
        super().__post_init__()

    @property
    def answers(self) -> int:
        """Answers of all processes in one batch."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        return self.generation_batch_size or self.per_device_train_batch_size * world_size() * steps

    def episodes(self, steps: int) -> int:
        """Answers sampled in so many optimizer steps."""
        uses = (self.steps_per_generation or 1) * self.num_iterations
        return math.ceil(steps * self.gradient_accumulation_steps / uses) * self.answers


class SafeRLOOTrainer(SafeTrainer, RLOOTrainer):
    """TRL's, whose runs lose nothing that was saved."""


def build_rloo_trainer(arguments: RLOOArguments, model_config: ModelConfig, training: RLOOConfig) -> RLOOTrainer:
    """Assemble the trainer. Everything that the caller can get wrong is found before weights are read."""
    from transformers import set_seed

    start = check_policy(
        model_config, None, pad_token=training.pad_token, trust_remote_code=training.trust_remote_code
    )
    prompts, held_out = load_prompts(arguments, start, training)
    require_held_out(held_out, training, arguments.dataset_test_split)
    sources = check_rewards(arguments, training, prompts.column_names)
    training = choose_precision(training, start.config.hidden_size)
    configure_cpu_runtime_(training, start.config.hidden_size)
    functions = load_trl_reward_functions(
        sources, start.tokenizer, training.device, training.normalize_rewards, **arguments.frozen(model_config)
    )
    set_seed(training.seed)
    model = load_causal_lm(start.name, model_config, trust_remote_code=training.trust_remote_code)
    stops = {start.tokenizer.eos_token_id, *stop_ids(model, start.tokenizer)}
    reset_generation_config_(model, stops)
    if training.missing_eos_penalty is not None:
        functions.append(missing_eos(training.missing_eos_penalty, stops))
        training.reward_weights = training.reward_weights and [*training.reward_weights, 1.0]
    trainer = SafeRLOOTrainer(
        model=prepare_for_lora(model, training.gradient_checkpointing),
        reward_funcs=functions,
        args=training,
        train_dataset=prompts,
        eval_dataset=held_out,
        processing_class=start.tokenizer,
        peft_config=build_lora_config(model_config),
    )
    if is_quantized(model):
        trainable_to_float32_(trainer.model)
    if trainer.ref_model is not None and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        # TRL has read the reference by the model's name, which for a LoRA folder is that of its base.
        trainer.ref_model.load_state_dict(trainer.model.state_dict())
    for reader in (trainer.model, trainer.ref_model):
        count_positions_from_mask_(reader)
    return trainer


def run_rloo(arguments: RLOOArguments, model_config: ModelConfig, training: RLOOConfig) -> Path:
    """Train and leave a folder with the model (or its LoRA adapter), its tokenizer and what was measured."""
    inputs = [model_config.model_name_or_path, arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    inputs += arguments.reward or []
    run = open_run(training, arguments, model_config, inputs=inputs)
    if run.finished:
        return run.folder
    trainer = build_rloo_trainer(arguments, model_config, training)
    with under_way(trainer, run):
        metrics = train(trainer, run)
        save_model(trainer, run.folder)
        held_out = trainer.evaluate() if trainer.eval_dataset is not None else {}
        if trainer.is_world_process_zero():
            trainer.save_state()
            log = trainer.state.log_history
            metrics["episodes"] = trainer.args.episodes(trainer.state.global_step)
            metrics |= rloo_metrics(log) | answer_metrics(held_out, "eval_")
            metrics |= {name: value for name, value in held_out.items() if name.startswith("eval_rewards/")}
            plot_curves(log, run.folder / "curves.png", select_logged_panels(CURVES, log), title="RLOO")
            complete_output_folder(
                run.folder,
                stage="rloo",
                title="A model that answers better",
                parents={
                    "model": model_config.model_name_or_path,
                    "reward": ", ".join(arguments.reward or []),
                    "prompts": arguments.dataset_name,
                },
                metrics=metrics,
                arguments=[arguments, model_config, training],
                images=["curves.png"],
            )
    return run.folder


def load_prompts(arguments: RLOOArguments, start: StartingModel, training: RLOOConfig) -> "tuple[Any, Any | None]":
    """The training and held-out prompts; every one of them is text or messages and leaves room for an answer."""

    def checked(rows: Any, name: str) -> Any:
        if rows is None:
            return None
        require_columns(rows, ["prompt"], role=name)
        require_texts(rows, ["prompt"], start.tokenizer, name)
        columns = Prompts(
            rows, start.tokenizer, context_length(start.config), training.max_completion_length, name
        ).columns
        return rows.select_columns(["prompt", *columns])

    train_rows, test_rows = load_train_and_test(arguments)
    prompts, held_out = checked(train_rows, "the training split"), checked(test_rows, "the held-out split")
    asked = training.answers // training.num_generations
    if len(prompts) < asked:
        raise UserError(
            f"the training split has {len(prompts)} prompts, fewer than the {asked} of one batch "
            "(per_device_train_batch_size x steps_per_generation x processes / num_generations); lower the batch"
        )
    return prompts, held_out


def check_rewards(arguments: RLOOArguments, training: RLOOConfig, columns: list[str]) -> list[str]:
    """What scores the answers, once it is known that it can. columns: those of the prompts."""
    sources = list(arguments.reward or [])
    if not sources:
        raise UserError(
            "nothing scores the answers; pass --reward with a reward model's folder or package.module:function"
        )
    for source in sources:
        check_reward(source, [name for name in columns if name != "prompt"])
    weights = training.reward_weights
    if weights is not None and len(weights) != len(sources):
        raise UserError(f"there are {len(sources)} rewards and {len(weights)} reward_weights; give one weight each")
    return sources


def reset_generation_config_(model: "PreTrainedModel", stops: set[int]) -> None:
    """Let the generation config say how answers end and nothing else: what cuts or bends the distribution that is
    sampled from (no_repeat_ngram_size, suppress_tokens, ...) is not in the probabilities that are learnt from."""
    from transformers import GenerationConfig

    said = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=said.bos_token_id, eos_token_id=sorted(stops), pad_token_id=said.pad_token_id
    )


def rloo_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Score, KL, length and EOS share of the first and of the last logged batch of answers, under ppo's names."""
    updates = [entry for entry in log_history if "reward" in entry]
    if not updates:
        return {}
    before = {f"{name}_before": value for name, value in answer_metrics(updates[0]).items()}
    return before | answer_metrics(updates[-1])


def answer_metrics(entry: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """What TRL logs of a batch of answers, in ppo's words: the KL in nats an answer, and how many ended."""
    if f"{prefix}reward" not in entry:
        return {}
    length = entry[f"{prefix}completions/mean_length"]
    kl = {f"{prefix}kl": entry[f"{prefix}kl"] * length} if f"{prefix}kl" in entry else {}
    ended = 1.0 - entry[f"{prefix}completions/clipped_ratio"]
    return {f"{prefix}score": entry[f"{prefix}reward"]} | kl | {f"{prefix}length": length, f"{prefix}eos_share": ended}
