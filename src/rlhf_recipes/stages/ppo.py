"""Proximal policy optimisation: reinforce a chat model against rewards, on prompts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    PROMPT,
    TEXT,
    FormOptions,
    first_row,
    load_rows,
    prompts_by_split,
    require_columns,
    require_held_out,
    text_ids,
    write_rows,
)
from rlhf_recipes.generation import check_turn_end
from rlhf_recipes.models import (
    attach_adapter,
    build_empty_model,
    build_lora_config,
    check_quantization,
    context_length,
    has_adapter,
    hidden_size_of,
    is_adapter,
    is_quantized,
    load_causal_lm,
    load_config,
    load_reward_model,
    load_tokenizer,
    prepare_for_lora_,
    quantization_kwargs,
    reward_label_count,
    saved_eos_ids,
)
from rlhf_recipes.optimizations import check_layer_names
from rlhf_recipes.ppo import PPOConfig, PPOTrainer, check_parallelism, check_prompts
from rlhf_recipes.scoring import check_reward
from rlhf_recipes.system import load_unsharded
from rlhf_recipes.training import (
    Measured,
    RewardedPromptsArguments,
    check_model_options,
    prepare_process_,
    run_training,
    training_inputs,
)

PANELS = [
    ("Score", ["objective/scores", "objective/rlhf_reward", "eval_objective/scores"]),
    ("KL to the reference (nats per answer)", ["objective/kl", "eval_objective/kl"]),
    ("Answer length (tokens)", ["completions/mean_length", "eval_completions/mean_length"]),
    ("Ended by a stop token", ["completions/eos_share", "eval_completions/eos_share"]),
    ("Entropy (nats per token)", ["policy/entropy_avg"]),
    ("Losses", ["loss/policy_avg", "loss/value_avg"]),
    ("Ratio clipped", ["policy/clipfrac_avg"]),
    ("Variance the values explain", ["val/explained_variance"]),
]

LOGGED = (
    "objective/scores",
    "objective/rlhf_reward",
    "objective/kl",
    "objective/entropy",
    "objective/non_score_reward",
    "completions/mean_length",
    "completions/eos_share",
    "rewards/",
)  # by an evaluation


@dataclass
class PPOArguments(RewardedPromptsArguments):
    """Prompts (column `prompt`: text, messages or ids) and the rewards of their answers."""

    reference_model: str | None = field(
        default=None, metadata={"help": "Reference model of the KL penalty. Unset: the model as it starts."}
    )
    value_model: str | None = field(
        default=None,
        metadata={
            "help": "A ranking reward model to start a separate value model from. Unset: a value head on the policy."
        },
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Pad token for a tokenizer that has none; its EOS may serve as both."}
    )
    prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Use this many first tokens of the column `text` (BOS counts) as the prompt, for plain-text data."
        },
    )


def build_ppo_trainer(arguments: PPOArguments, model_config: ModelConfig, training: PPOConfig) -> PPOTrainer:
    """Build the trainer. Invalid options and rows raise a `UserError` before weights are loaded."""
    check_parallelism(training, getattr(training.distributed_state, "distributed_type", None))
    name = model_config.model_name_or_path
    if not name:
        raise UserError(
            "no model to train; pass --model_name_or_path with a folder (such as the sft stage's) or Hub id"
        )
    rewards = list(arguments.reward or [])
    if not rewards:
        raise UserError("no reward; pass --reward with a reward model's folder or package.module:function")
    pad = {"pad_token": arguments.pad_token} if arguments.pad_token else {}
    remote_code: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    config, tokenizer = load_config(name, **remote_code), load_tokenizer(name, **pad, **remote_code)
    check_quantization(model_config, config, trains_loaded_adapter=True)
    if arguments.value_model and reward_label_count(arguments.value_model) != 1:
        raise UserError(
            f"value model {arguments.value_model} has two labels; give a ranking reward model, which has one"
        )
    form = PROMPT if arguments.prompt_tokens is None else TEXT
    rows = load_rows(arguments, FormOptions((form,), keep_columns=True, tokenizer=tokenizer))
    rows = rows.each_split(lambda dataset, _: with_prompts(dataset, tokenizer, arguments.prompt_tokens))
    require_held_out(rows.test, training, arguments.dataset_test_split)
    first = first_row(rows.train) or {}
    for reward in rewards:
        check_reward(reward, [column for column in first if column != "prompt"])
    check_turn_end(first.get("prompt"), tokenizer, saved_eos_ids(name, config), name)
    room = (context_length(config), training.response_length)
    train, test = prompts_by_split(rows, tokenizer, room, arguments.too_long)
    check_prompts(config, tokenizer, train, test, training)
    if training.num_layers_unfrozen is not None:
        check_layer_names(build_empty_model(config, **remote_code))
    check_model_options(training, model_config, config, LOGGED)
    lora = build_lora_config(model_config, config, **remote_code)
    frozen_kwargs, reference_name = arguments.frozen_model_kwargs(model_config), arguments.reference_model
    training = prepare_process_(  # seeds first: a new adapter is random
        training, hidden_size_of(config), adapter=model_config.use_peft or is_adapter(name)
    )
    with load_unsharded():
        policy = load_causal_lm(name, model_config, **remote_code)
        reference = load_causal_lm(reference_name, **frozen_kwargs, **remote_code) if reference_name else None
        value = load_value_model(arguments.value_model, model_config) if arguments.value_model else None
    trainer = PPOTrainer(
        policy,
        rewards,
        training,
        train,
        test,
        tokenizer,
        ref_model=reference,
        value_model=value,
        peft_config=lora,
        reward_quantization_config=frozen_kwargs.get("quantization_config"),
    )
    trainer.row_counts = rows.counts
    return trainer


def load_value_model(name: str, model_config: ModelConfig) -> Any:
    """Load a separate value model. With LoRA on quantized weights, quantize it and add an adapter, unless it has one."""
    adapter = build_lora_config(model_config, load_config(name, "value model"), "SEQ_CLS")
    if adapter is None:
        return load_reward_model(name)
    bits = 8 if model_config.load_in_8bit else 4 if model_config.load_in_4bit else None
    model = load_reward_model(
        name, **quantization_kwargs(bits, model_config.bnb_4bit_quant_type, model_config.use_bnb_nested_quant)
    )
    if not is_quantized(model) or has_adapter(model):
        return model
    return attach_adapter(prepare_for_lora_(model), adapter)


def run_ppo(arguments: PPOArguments, model_config: ModelConfig, training: PPOConfig) -> Path:
    """Train and leave a folder with the policy, its value model, its tokenizer and its metrics."""
    models = [*(arguments.reward or []), arguments.reference_model, arguments.value_model]
    return run_training(
        "ppo",
        [arguments, model_config, training],
        lambda: build_ppo_trainer(arguments, model_config, training),
        measure_ppo,
        title="A model that answers better",
        parents={
            "model": model_config.model_name_or_path,
            "reward": ", ".join(arguments.reward or []),
            "prompts": arguments.dataset_name,
        },
        inputs=training_inputs(model_config, arguments, *models),
        plot_title="PPO",
        panels=PANELS,
        measure_before=lambda trainer: trainer.evaluate() if trainer.eval_prompts is not None else {},
    )


def measure_ppo(trainer: PPOTrainer, folder: Path) -> Measured:
    """Return the metrics of the run and of the held-out prompts, and write samples.jsonl. All ranks must call it."""
    held_out = trainer.evaluate() if trainer.eval_prompts is not None else {}
    if trainer.is_world_process_zero():
        write_rows(folder / "samples.jsonl", trainer.last_samples)
    return Measured(ppo_metrics(trainer.state.log_history) | held_out)


def with_prompts(dataset: Any, tokenizer: Any, prompt_tokens: int | None) -> Any:
    """Return the dataset, or one whose column `prompt` is the first `prompt_tokens` tokens of the column `text`, as ids.

    Raises:
        UserError: the dataset has no column `text`; names its columns.
    """
    if dataset is None or prompt_tokens is None:
        return dataset
    require_columns(dataset, ["text"], role="with prompt_tokens, the dataset")
    dataset = dataset.filter(lambda row: bool(row["text"].strip()))
    return dataset.map(
        lambda row: {"prompt": text_ids(row["text"], tokenizer)[:prompt_tokens]}, remove_columns=["text"]
    )


def ppo_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Return score, KL, length and EOS share of the first and the last logged update."""
    updates = [entry for entry in log_history if "objective/scores" in entry]
    if not updates:
        return {}
    names = {
        "score": "objective/scores",
        "kl": "objective/kl",
        "length": "completions/mean_length",
        "eos_share": "completions/eos_share",
    }
    first = {f"{name}_before": updates[0][key] for name, key in names.items()}
    return first | {name: updates[-1][key] for name, key in names.items()} | {"episodes": updates[-1]["episode"]}
