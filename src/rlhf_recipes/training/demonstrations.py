"""Demonstrations of supervised fine-tuning: from the dataset to token ids and the tokens that have loss."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.arguments import RowLengthArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import (
    COMPLETION,
    MESSAGES,
    NO_LOSS,
    TEXT,
    FormOptions,
    LoadedRows,
    RowCounts,
    check_rows,
    drop_rows,
    encode_demonstration,
    encode_rows,
    first_row,
    fit_rows,
    is_conversation,
    is_empty_answer,
    load_rows,
    require_assistant_spans,
    require_turn_end,
    text_options,
)
from rlhf_recipes.models import StartingModel, saved_eos_ids

if TYPE_CHECKING:
    from trl import SFTConfig

FORM_COLUMNS = ("prompt", "completion", "messages", "text")


def load_demonstrations(arguments: RowLengthArguments, start: StartingModel, text_column: str = "text") -> LoadedRows:
    """Load the training and the test rows with the columns that are used, and check each row."""
    options = FormOptions((COMPLETION, MESSAGES, TEXT), tokenizer=start.tokenizer)
    rows = load_rows(arguments, text_options(options, text_column))
    columns = [name for name in FORM_COLUMNS if name in rows.train.column_names]
    return rows.each_split(lambda dataset, counts: check_rows(dataset, columns, start.tokenizer, counts.name))


def encode_demonstrations(
    rows: Any, counts: RowCounts, start: StartingModel, too_long: str, training: "SFTConfig"
) -> Any:
    """Tokenize demonstrations to `input_ids` and `labels`, and drop or cut those that are too long.

    Raises:
        UserError: a chat template that does not show what the assistant says, or ends it with a token at which nothing
            stops; assistant_only_loss for rows of text; no row is left.
    """
    first = first_row(rows) or {}
    chat = is_conversation(first.get("messages") or first.get("completion"))
    if training.assistant_only_loss and not chat:
        raise UserError("assistant_only_loss needs rows of messages, and these rows are text; leave it out")
    assistant_only = training.assistant_only_loss
    if assistant_only is None:
        assistant_only = "messages" in first
    if chat:
        _require_stop(start)
    if assistant_only:
        turns = first.get("messages") or [*first["prompt"], *first["completion"]]
        require_assistant_spans(start.tokenizer, turns, start.name)
    encode = partial(
        encode_demonstration,
        tokenizer=start.tokenizer,
        assistant_only=assistant_only,
        completion_only=training.completion_only_loss is not False,
    )
    encoded = encode_rows(rows, encode, training.dataset_num_proc)
    keep_end = getattr(training, "truncation_mode", "keep_start") == "keep_end"
    encoded = fit_rows(encoded, start.max_length, too_long, counts, keep_end=keep_end)
    advice = "leave them out of the dataset"

    def trained(row: Any) -> list[int]:
        return [label for label in row["labels"] if label != NO_LOSS]

    encoded = drop_rows(
        encoded, lambda row: not trained(row), counts, "without_loss", "have no token with loss", advice
    )
    encoded = drop_rows(
        encoded,
        lambda row: is_empty_answer(trained(row), start.tokenizer),
        counts, "empty_answers", "have an empty answer", advice,
    )  # fmt: skip
    return encoded


def loss_spans(dataset: Any, prefix: Sequence[int] = ()) -> list[tuple[list[int], list[int]]]:
    """Return (ids before, ids with loss) of every unbroken span of tokens with loss.

    Args:
        dataset: rows of `input_ids` and `labels`, where the label -100 means no loss.
        prefix: ids that the tokenizer puts before a text; they are never measured.
    """
    spans = []
    for row in dataset:
        ids, has_loss = row["input_ids"], [label != NO_LOSS for label in row["labels"]]
        starts = [index for index in range(len(ids)) if has_loss[index] and not (index and has_loss[index - 1])]
        for start in starts:
            end = next((index for index in range(start, len(ids)) if not has_loss[index]), len(ids))
            if start == 0 and ids[: len(prefix)] == list(prefix):
                start = len(prefix)
            spans.append((ids[:start], ids[start:end]))
    return spans


def _require_stop(start: StartingModel) -> None:
    """Check that generation stops at the token with which the chat template ends an answer."""
    end = require_turn_end(start.tokenizer, start.name)
    stops = {start.tokenizer.eos_token_id, *saved_eos_ids(start.name, start.config)}
    if end.id not in stops:
        raise UserError(
            f"the chat template of {start.name} ends an answer with {end.token}, but generation stops at "
            f'{start.tokenizer.eos_token}, so no answer would end; pass --eos_token "{end.token}"'
        )
