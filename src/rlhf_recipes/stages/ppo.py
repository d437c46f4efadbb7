"""A model that answers, something that scores answers, and prompts -> a model that answers better."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import first_row, load_train_and_test, require_columns, require_held_out, write_rows
from rlhf_recipes.folders import complete_output_folder
from rlhf_recipes.models import (
    FrozenQuantizationArguments,
    build_lora_config,
    check_quantization,
    has_adapter,
    is_quantized,
    load_causal_lm,
    load_config,
    load_reward_model,
    load_tokenizer,
    prepare_for_lora,
    quantization_kwargs,
    reward_label_count,
)
from rlhf_recipes.ppo import PPOConfig, PPOTrainer, check_parallelism, check_prompts
from rlhf_recipes.reports import plot_curves
from rlhf_recipes.scoring import check_reward
from rlhf_recipes.system import choose_precision, configure_cpu_runtime_, load_unsharded
from rlhf_recipes.training import open_run, save_model, select_logged_panels, train, under_way

CURVES = [
    ("Score", ["objective/scores", "objective/rlhf_reward", "eval_objective/scores"]),
    ("KL to the reference (nats an answer)", ["objective/kl", "eval_objective/kl"]),
    ("Answer length (tokens)", ["completions/mean_length", "eval_completions/mean_length"]),
    ("Ended by a stop token", ["completions/eos_share", "eval_completions/eos_share"]),
    ("Entropy (nats a token)", ["policy/entropy_avg"]),
    ("Losses", ["loss/policy_avg", "loss/value_avg"]),
    ("Ratio clipped", ["policy/clipfrac_avg"]),
    ("Variance the values explain", ["val/explained_variance"]),
]


@dataclass
class PPOArguments(DatasetArguments, FrozenQuantizationArguments):
    """Prompts (column `prompt`: text, messages or ids) and what scores their answers."""

    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "What scores answers: reward models' folders or Hub ids, or package.module:function; several add up."
        },
    )
    reference_model: str | None = field(
        default=None, metadata={"help": "What the KL penalty holds the policy near. Unset: the model as it starts."}
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
        metadata={"help": "Take the first so many tokens of the column `text` as the prompt, for plain-text data."},
    )


def build_ppo_trainer(arguments: PPOArguments, model_config: ModelConfig, training: PPOConfig) -> PPOTrainer:
    """Assemble the trainer. Everything that the caller can get wrong is found before weights are read."""
    from transformers import set_seed

    check_parallelism(training, getattr(training.distributed_state, "distributed_type", None))
    name = model_config.model_name_or_path
    if not name:
        raise UserError(
            "no model to train; pass --model_name_or_path with a folder (the sft stage leaves one) or Hub id"
        )
    rewards = list(arguments.reward or [])
    if not rewards:
        raise UserError(
            "nothing scores the answers; pass --reward with a reward model's folder or package.module:function"
        )
    pad = {"pad_token": arguments.pad_token} if arguments.pad_token else {}
    code: dict[str, Any] = {"trust_remote_code": training.trust_remote_code}
    config, tokenizer = load_config(name, **code), load_tokenizer(name, **pad, **code)
    check_quantization(model_config, config, adapter_goes_on=True)
    if arguments.value_model and reward_label_count(arguments.value_model) != 1:
        raise UserError(
            f"value model {arguments.value_model} has two labels; give a ranking reward model, which has one"
        )
    splits = load_train_and_test(arguments)
    train, test = (with_prompts(split, tokenizer, arguments.prompt_tokens) for split in splits)
    require_held_out(test, training, arguments.dataset_test_split)
    for reward in rewards:
        check_reward(reward, [name for name in first_row(train) or {} if name != "prompt"])
    check_prompts(config, tokenizer, train, test, training)
    hidden_size = config.get_text_config().hidden_size
    training = choose_precision(training, hidden_size)
    configure_cpu_runtime_(training, hidden_size)
    frozen, name_of_reference = arguments.frozen(model_config), arguments.reference_model
    set_seed(training.seed)  # a new adapter is drawn at random
    with load_unsharded():
        policy = load_causal_lm(name, model_config, **code)
        reference = load_causal_lm(name_of_reference, **frozen, **code) if name_of_reference else None
        value = load_value_model(arguments.value_model, model_config) if arguments.value_model else None
    return PPOTrainer(
        policy,
        rewards,
        training,
        train,
        test,
        tokenizer,
        ref_model=reference,
        value_model=value,
        peft_config=build_lora_config(model_config),
        reward_quantization_config=frozen.get("quantization_config"),
    )


def load_value_model(name: str, model_config: ModelConfig) -> Any:
    """A value model of its own. Where the policy gets an adapter in 4 or 8 bits so does this, unless it is one already."""
    adapter = build_lora_config(model_config, "SEQ_CLS")
    if adapter is None:
        return load_reward_model(name)
    bits = 8 if model_config.load_in_8bit else 4 if model_config.load_in_4bit else None
    model = load_reward_model(
        name, **quantization_kwargs(bits, model_config.bnb_4bit_quant_type, model_config.use_bnb_nested_quant)
    )
    if not is_quantized(model) or has_adapter(model):
        return model
    from peft import get_peft_model

    return get_peft_model(prepare_for_lora(model), adapter)


def run_ppo(arguments: PPOArguments, model_config: ModelConfig, training: PPOConfig) -> Path:
    """Train and leave a folder with the policy, its value model, its tokenizer and what was measured."""
    inputs = [model_config.model_name_or_path, arguments.dataset_name, *(arguments.extra_dataset_names or [])]
    inputs += [*(arguments.reward or []), arguments.reference_model, arguments.value_model]
    run = open_run(training, arguments, model_config, inputs=inputs)
    if run.finished:
        return run.folder
    trainer = build_ppo_trainer(arguments, model_config, training)
    with under_way(trainer, run):
        metrics = train(trainer, run)
        save_model(trainer, run.folder)
        held_out = trainer.evaluate() if trainer.eval_prompts is not None else {}
        metrics |= ppo_metrics(trainer.state.log_history) | held_out
        if trainer.is_world_process_zero():
            write_rows(run.folder / "samples.jsonl", trainer.last_samples)
            trainer.save_state()
            log = trainer.state.log_history
            plot_curves(log, run.folder / "curves.png", select_logged_panels(CURVES, log), title="PPO")
            complete_output_folder(
                run.folder,
                stage="ppo",
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


def with_prompts(dataset: Any, tokenizer: Any, prompt_tokens: int | None) -> Any:
    """The dataset as it is, or with the first `prompt_tokens` tokens of its column `text` as the column `prompt`.

    Raises:
        UserError: neither a prompt nor a text to take it from; names the columns there are.
    """
    if dataset is None or prompt_tokens is None:
        return dataset
    require_columns(dataset, ["text"], role="with prompt_tokens, the dataset")
    dataset = dataset.filter(lambda row: bool(row["text"].strip()))

    def start(row: dict[str, Any]) -> dict[str, str]:
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"][:prompt_tokens]
        return {"prompt": tokenizer.decode(ids)}

    return dataset.map(start, remove_columns=["text"])


def ppo_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Score, KL, length and EOS share of the first and of the last logged update."""
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
