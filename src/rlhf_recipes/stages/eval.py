"""Evaluation: compare models on the same prompts with the same random numbers.

Perplexity measures how well a model predicts a text. The reward model, gold and their win rates measure its answers. KL to a
reference, length and repetition measure what the improvement cost.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_recipes.core.arguments import TOO_LONG, OutputArguments, ReadingArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.core.processes import is_main_process
from rlhf_recipes.data import (
    PROMPT,
    RESERVED_COLUMNS,
    TEXT,
    FormOptions,
    load_split_rows,
    read_prompt,
    text_options,
    write_rows,
)
from rlhf_recipes.evaluation import (
    EvalInputs,
    Evaluation,
    compare,
    comparison_tables,
    evaluate_model,
    evenly_spaced,
    first_tokens,
    fit_inputs,
)
from rlhf_recipes.folders import check_output_folder, clear_output_folder, complete_output_folder
from rlhf_recipes.generation import Sampling, check_turn_end, stop_ids
from rlhf_recipes.models import (
    LoadingArguments,
    check_stop_id,
    context_length,
    is_reward_model,
    load_causal_lm,
    load_config,
    load_tokenizer,
    saved_eos_ids,
    token_count,
)
from rlhf_recipes.reports import plot_bars
from rlhf_recipes.scoring import check_reward, load_reward
from rlhf_recipes.system import configure_cpu_inference_, inference_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PLOTTED_METRICS = ("gold_score", "reward_positive", "reward_score", "perplexity", "kl", "length", "distinct_2")
COUNTS = ("max_new_tokens", "completions_per_prompt", "batch_size", "num_prompts", "num_texts", "prompt_tokens")


@dataclass
class EvalArguments(OutputArguments, ReadingArguments, LoadingArguments):
    """The models, the prompts and texts, and the rewards of the answers."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Models to compare, folders or Hub ids; win rates are over the first."},
    )
    output_dir: str = field(default="runs/eval", metadata={"help": "Output folder for the report."})
    dataset_name: str | None = field(default=None, metadata={"help": "Prompts: a folder, a data file or a Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration (subset) of a Hub dataset."})
    dataset_split: str = field(default="test", metadata={"help": "Split of the prompts and of the texts."})
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with a prompt: text, messages or ids. Unset: found by its name. The other columns are passed to "
            "gold and to reward functions."
        },
    )
    prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "Use this many first tokens of each prompt (the first model's tokens; BOS counts)."},
    )
    too_long: str | None = field(
        default=None,
        metadata={
            "help": "What happens to a prompt without room for an answer in the context of a model: drop it for all models, "
            "cut it to its last tokens, or error (unset)."
        },
    )
    num_prompts: int | None = field(
        default=256, metadata={"help": "Number of prompts, evenly spaced over the dataset."}
    )
    text_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Texts for perplexity: a folder, a file or a Hub id. Unset: not measured."},
    )
    text_column: str = field(default="text", metadata={"help": "Column with a text."})
    num_texts: int | None = field(default=256, metadata={"help": "Number of texts, evenly spaced over the dataset."})
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Reward that scores the answers: a reward model's folder or Hub id, or package.module:function."
        },
    )
    gold: str | None = field(
        default=None,
        metadata={"help": "Gold reward, where the truth is known, such as rlhf_recipes.quickstart:gold_score."},
    )
    reference: str | None = field(
        default=None, metadata={"help": "Reference model of the KL. Unset: the first model."}
    )
    max_new_tokens: int = field(default=53, metadata={"help": "Longest answer in tokens."})
    stop_token_id: int | None = field(
        default=None, metadata={"help": "Stop at this token id instead of the model's EOS."}
    )
    min_new_tokens: int = field(
        default=0, metadata={"help": "Shortest answer in tokens: no stop token is sampled before."}
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Sampling temperature; 0 takes the likeliest token, and then KL is not measured."},
    )
    completions_per_prompt: int = field(default=1, metadata={"help": "Answers sampled for each prompt."})
    batch_size: int = field(default=64, metadata={"help": "Answers sampled at once; it changes no metric."})
    seed: int = field(default=0, metadata={"help": "Seed of the answers, the same for every model."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even where there is a GPU."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.too_long not in (None, *TOO_LONG):
            raise UserError(f"too_long is {self.too_long!r}; choose one of {', '.join(TOO_LONG)}")


def run_eval(arguments: EvalArguments) -> Path:
    """Measure every model, compare each with the first, and leave a report folder; returns its path."""
    sources = [arguments.dataset_name, arguments.text_dataset_name, arguments.reward_model, arguments.reference]
    folder = check_output_folder(arguments.output_dir, arguments.overwrite, [*arguments.models, *sources])
    tokenizers = load_tokenizers(arguments)
    inputs = load_inputs(arguments, tokenizers)
    if not is_main_process():
        return folder  # one process measures
    start = time.perf_counter()
    names = name_models(arguments.models)
    evaluations = evaluate_all(arguments, names, tokenizers, inputs)
    measured = {name: dict(evaluation.metrics) for name, evaluation in evaluations.items()}
    for name in names[1:]:
        measured[name] |= compare(evaluations[name], evaluations[names[0]])
    clear_output_folder(folder)
    rows = [{"model": name} | row for name in names for row in evaluations[name].rows]
    write_rows(folder / "completions.jsonl", rows)
    keys = [key for key in PLOTTED_METRICS if any(key in metrics for metrics in measured.values())]
    plot_bars(measured, keys, folder / "models.png", title="Models side by side")
    facts = {
        "rows": {"test": dict(inputs.counts)},
        "prompts": len(inputs.prompts),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return complete_output_folder(
        folder,
        stage="eval",
        title="Models side by side: " + ", ".join(names),
        parents={
            **dict(zip(names, arguments.models, strict=True)),
            "prompts": arguments.dataset_name,
            "reward model": arguments.reward_model,
        },
        metrics={"models": measured, **facts, **(measured[names[0]] if len(names) == 1 else {})},
        arguments=[arguments],
        images=["models.png"],
        notes=comparison_tables(measured, evaluations),
    )


def load_tokenizers(arguments: EvalArguments) -> "list[PreTrainedTokenizerBase]":
    """Check models and reference without loading weights, and return the tokenizer of each model.

    Raises:
        UserError: no models; a model or reference that cannot be loaded or is not a language model; a reference with
            another vocabulary.
    """
    if not arguments.models:
        raise UserError("no models; pass --models with one or more folders or Hub ids")
    sources = [*arguments.models, *([arguments.reference] if arguments.reference else [])]
    for name in sources:
        load_config(name, **arguments.remote_code_kwargs)
        if is_reward_model(name, **arguments.remote_code_kwargs):
            raise UserError(
                f"model {name} is a reward model; give a language model, and pass this one as --reward_model"
            )
    tokenizers = [load_tokenizer(name, "model", **arguments.remote_code_kwargs) for name in sources]
    if arguments.reference:
        reference = tokenizers.pop()
        for name, tokenizer in zip(arguments.models, tokenizers, strict=True):
            if tokenizer.get_vocab() != reference.get_vocab():
                raise UserError(
                    f"reference {arguments.reference} has another vocabulary than model {name}, so there is no KL "
                    "between them; leave --reference out or give one of the same family"
                )
    return tokenizers


def load_inputs(arguments: EvalArguments, tokenizers: "Sequence[PreTrainedTokenizerBase]") -> EvalInputs:
    """Load prompts and texts; check that prompts fit every model, and reward model and gold against the columns.

    Raises:
        UserError: no dataset, a missing column, a prompt too long for a context, a reward model that cannot be used.
    """
    if not arguments.dataset_name:
        raise UserError("no prompts; pass --dataset_name with a folder, a data file or a Hub id")
    named = {} if arguments.prompt_column is None else {"prompt": arguments.prompt_column}
    texts_too = arguments.prompt_tokens is not None
    options = FormOptions((PROMPT,), columns=named, tokenizer=tokenizers[0], text_prompts=texts_too)
    loaded = load_split_rows(
        arguments.dataset_name, arguments.dataset_split, arguments, options, config=arguments.dataset_config
    )
    rows = evenly_spaced(loaded.train, arguments.num_prompts)
    prompts = [read_prompt(row, "prompt", f"prompt row {index}") for index, row in enumerate(rows)]
    if arguments.prompt_tokens:
        prompts = [first_tokens(prompt, tokenizers[0], arguments.prompt_tokens) for prompt in prompts]
    columns = {name: list(rows[name]) for name in rows.column_names if name not in {"prompt", *RESERVED_COLUMNS}}
    for role, source in (("reward model", arguments.reward_model), ("gold", arguments.gold)):
        if source:
            check_reward(source, list(columns), role)
    texts: list[str] = []
    if arguments.text_dataset_name:
        text_form = text_options(FormOptions((TEXT,), keep_columns=True), arguments.text_column)
        reading = replace(arguments, columns=None, ignore_columns=None, dataset_format="auto")
        documents = load_split_rows(arguments.text_dataset_name, arguments.dataset_split, reading, text_form)
        texts = list(evenly_spaced(documents.train, arguments.num_texts)["text"])
    contexts: list[tuple[str, int | None]] = []
    for name, tokenizer in zip(arguments.models, tokenizers, strict=True):
        config = load_config(name, **arguments.remote_code_kwargs)
        check_stop_id(arguments.stop_token_id, token_count(tokenizer))
        check_turn_end(prompts[0], tokenizer, saved_eos_ids(name, config), name)
        contexts.append((name, context_length(config)))
    inputs = EvalInputs(prompts, columns, texts)
    return fit_inputs(inputs, tokenizers, contexts, arguments.max_new_tokens, arguments.too_long)


def evaluate_all(
    arguments: EvalArguments,
    names: Sequence[str],
    tokenizers: "Sequence[PreTrainedTokenizerBase]",
    inputs: EvalInputs,
) -> dict[str, Evaluation]:
    """Evaluate each model, by name; one at a time is in memory, beside the reference and the reward model."""
    device = inference_device(arguments.use_cpu)
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, min_new_tokens=arguments.min_new_tokens)
    bits, frozen = arguments.model_kwargs(), arguments.frozen_model_kwargs(arguments)
    reference_name = arguments.reference or arguments.models[0]
    reference_options = frozen | arguments.remote_code_kwargs if arguments.reference else bits
    reference = load_causal_lm(reference_name, **reference_options).to(device)
    configure_cpu_inference_(device, reference.config.get_text_config().hidden_size)
    evaluations = {}
    for index, (name, source, tokenizer) in enumerate(zip(names, arguments.models, tokenizers, strict=True)):
        logger.info("measuring %s", name)
        is_reference = (source, bits) == (reference_name, reference_options)
        model = reference if is_reference else load_causal_lm(source, **bits).to(device)
        comparable = tokenizer.get_vocab() == tokenizers[0].get_vocab()  # an explicit reference has been checked
        if not comparable:
            logger.warning("%s has another vocabulary than %s, so its KL is not measured", name, names[0])
        reward_source, stop_id = arguments.reward_model, arguments.stop_token_id
        reward = load_reward(reward_source, tokenizer, device=device, **frozen) if reward_source else None
        stops = stop_ids(model, tokenizer) if stop_id is None else (stop_id,)
        evaluations[name] = evaluate_model(
            model,
            tokenizer,
            inputs.prompts_for(tokenizer, tokenizers[0]),
            sampling=replace(sampling, stop_ids=stops, vocabulary=token_count(tokenizer)),
            seed=arguments.seed,
            completions_per_prompt=arguments.completions_per_prompt,
            columns=inputs.columns,
            reward_model=reward,
            gold=load_reward(arguments.gold, tokenizer, device=device) if arguments.gold else None,
            reference=reference if comparable else None,
            texts=inputs.texts,
            batch_size=arguments.batch_size,
            progress=True,
            max_prompt_tokens=inputs.max_prompt_tokens[index],
        )
    return evaluations


def name_models(sources: Sequence[str]) -> list[str]:
    """Return a short name for each model: its last folder, or the whole source where two share it; numbered if repeated."""
    short = [os.path.basename(os.path.normpath(source)) for source in sources]
    names = [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]
