"""Preferences and labels: from the dataset to token ids, for the reward model and for DPO."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    LABEL,
    PREFERENCE,
    FormOptions,
    LoadedRows,
    RowCounts,
    check_rows,
    drop_unhelpful_pairs,
    encode_pair,
    encode_rows,
    first_row,
    fit_rows,
    is_conversation,
    is_empty_answer,
    load_rows,
    require_texts,
    require_turn_end,
)
from rlhf_recipes.generation import check_turn_end
from rlhf_recipes.models import StartingModel, saved_eos_ids
from rlhf_recipes.training.classifier import LABELLED_COLUMNS, encode_labelled

if TYPE_CHECKING:
    from trl import DPOConfig, RewardConfig

PAIR = ("chosen", "rejected")


def load_reward_rows(arguments: Any, start: StartingModel) -> LoadedRows:
    """Load preferences or labelled rows, as the columns decide, and check each row."""
    forms = {"ranking": (PREFERENCE,), "classifier": (LABEL,)}.get(arguments.reward_type, (PREFERENCE, LABEL))
    options = FormOptions(
        forms,
        positive_label=arguments.positive_label,
        label_threshold=arguments.label_threshold,
        margin=True,
        score_margin=arguments.score_margin,
        tokenizer=start.tokenizer,
    )
    rows = load_rows(arguments, options)
    if rows.form == LABEL:
        return rows.each_split(lambda dataset, counts: _check_labels(dataset, start, counts.name))
    columns = PAIR if not rows.train[0]["prompt"] else ("prompt", *PAIR)
    return rows.each_split(lambda dataset, counts: check_rows(dataset, columns, start.tokenizer, counts.name))


def _check_labels(dataset: Any, start: StartingModel, name: str) -> Any:
    columns = [column for column in ("prompt", *LABELLED_COLUMNS) if column in dataset.column_names]
    require_texts(dataset, columns, start.tokenizer, name)
    labels = set(dataset["label"])
    if len(labels) == 1:
        raise UserError(
            f"every label of {name} is {labels.pop()}, so there is nothing to tell apart; if the rows are sorted by "
            "label, leave out --max_train_samples and --max_test_samples or shuffle the file"
        )
    return dataset


def encode_pairs(
    rows: Any, counts: RowCounts, start: StartingModel, too_long: str | None, training: "RewardConfig"
) -> Any:
    """Tokenize pairs to `chosen_ids` and `rejected_ids`, each with the prompt, `prompt_length`, and `margin` if there is one.

    Raises:
        UserError: a chat template without a token that ends an answer; no pair is left.
    """
    if is_conversation((first_row(rows) or {}).get("chosen")):
        require_turn_end(start.tokenizer, start.name)
    pairs = encode_rows(rows, partial(encode_pair, tokenizer=start.tokenizer), training.dataset_num_proc)
    pairs = fit_rows(pairs, start.max_length, too_long or "drop", counts, unit="pair")
    pairs = drop_unhelpful_pairs(pairs, partial(is_empty_answer, tokenizer=start.tokenizer), counts)
    return encode_rows(pairs, _whole_rows, training.dataset_num_proc)


def _whole_rows(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pair whose two answers follow their prompt."""
    prompt, margin = pair["prompt_ids"], {"margin": pair["margin"]} if "margin" in pair else {}
    return (
        {name: prompt + pair[name] for name in ("chosen_ids", "rejected_ids")}
        | {"prompt_length": len(prompt)}
        | margin
    )


def encode_labels(
    rows: Any, counts: RowCounts, start: StartingModel, too_long: str | None, training: "RewardConfig"
) -> Any:
    """Tokenize labelled texts to `input_ids` and `labels`. A text that is cut has no EOS, as an incomplete answer has none."""
    encoded = encode_rows(rows, partial(encode_labelled, tokenizer=start.tokenizer), training.dataset_num_proc)
    return fit_rows(encoded, start.max_length, too_long or "cut", counts, unit="text")


def load_pairs(arguments: RowLengthArguments, start: StartingModel) -> LoadedRows:
    """Load the training and the test pairs and check each row."""
    pairs = load_rows(arguments, FormOptions((PREFERENCE,), tokenizer=start.tokenizer))
    if not pairs.train[0]["prompt"]:
        raise UserError(
            "the pairs have no prompts, and dpo compares answers to a prompt; say which column it is with --columns "
            "prompt=NAME"
        )
    return pairs.each_split(
        lambda dataset, counts: check_rows(dataset, ("prompt", *PAIR), start.tokenizer, counts.name)
    )


def encode_dpo_pairs(rows: Any, counts: RowCounts, start: StartingModel, too_long: str, training: "DPOConfig") -> Any:
    """Tokenize pairs to `prompt_ids`, `chosen_ids` and `rejected_ids`; drop or cut those that are too long.

    Raises:
        UserError: a chat template without a token that ends an answer; no pair is left.
    """
    stops = saved_eos_ids(start.name, start.config)
    check_turn_end((first_row(rows) or {}).get("chosen"), start.tokenizer, stops, start.name)
    encoded = encode_rows(rows, partial(encode_pair, tokenizer=start.tokenizer), training.dataset_num_proc)
    encoded = fit_rows(encoded, start.max_length, too_long, counts, unit="pair")
    return drop_unhelpful_pairs(encoded, partial(is_empty_answer, tokenizer=start.tokenizer), counts)
