"""Checks of dataset rows, made before a model is loaded. Every message names the row or the column that is wrong."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import bos_prefix, ensure_chat_template_, is_conversation, prompt_ids, prompt_text
from rlhf_recipes.data.rows import first_row, require_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

logger = logging.getLogger(__name__)


def require_batch(rows: int, training: "TrainingArguments", role: str = "the training split") -> None:
    """Check that there are enough rows for one optimizer step; Trainer drops or shrinks the batch without a warning.

    Raises:
        UserError: there are fewer.
    """
    sizes = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.world_size)
    needed = sizes[0] * sizes[1] * sizes[2]
    if rows < needed:
        raise UserError(
            f"{role} has {rows} rows, but one batch takes {needed} (per_device_train_batch_size {sizes[0]} x "
            f"gradient_accumulation_steps {sizes[1]} x {sizes[2]} processes); give more rows or lower one of these"
        )


def require_held_out(dataset: Any, training: "TrainingArguments", split: str) -> None:
    """Check that there are held-out rows if the run evaluates on them.

    Raises:
        UserError: `eval_strategy` is on and `dataset` is None.
    """
    if dataset is None and training.eval_strategy != "no":
        raise UserError(
            f"eval_strategy is {getattr(training.eval_strategy, 'value', training.eval_strategy)}, but the dataset "
            f"has no split {split!r}; name one with --dataset_test_split, or pass --eval_strategy no"
        )


def require_texts(
    dataset: Any, columns: Sequence[str], tokenizer: "PreTrainedTokenizerBase", name: str = "dataset"
) -> None:
    """Check that every value of `columns` is text, or every value a list of messages that the template can render.

    For messages, a tokenizer without a chat template gets ours.

    Raises:
        UserError: a row has neither, an empty prompt, or messages that the template refuses; names the first such row.
    """
    first = first_row(dataset) or {}
    chat = {column: is_conversation(first[column]) for column in columns}
    if len(set(chat.values())) > 1:
        forms = ", ".join(f"{column} holds {'messages' if chat[column] else 'text'}" for column in columns)
        raise UserError(f"{name} mixes forms: {forms}; give all of them as text or all as messages")
    if any(chat.values()):
        ensure_chat_template_(tokenizer)
    rendered: set[tuple[str, ...]] = set()
    for index, row in enumerate(dataset):
        for column in columns:
            value = row[column]
            prompt = row["prompt"] if chat[column] and column != "prompt" and "prompt" in columns else []
            problem = _messages_problem(value, prompt, tokenizer, rendered) if chat[column] else _text_problem(value)
            if problem:
                raise UserError(f"{name}, row {index}: the column {column} {problem}")
        if not chat[columns[0]] and "prompt" in columns and not row["prompt"]:
            raise UserError(f"{name}, row {index}: the prompt is empty; drop the row")


def require_text(dataset: Any, column: str, name: str = "dataset") -> None:
    """Check that the column exists and its first value is text; rows without a value are allowed.

    Raises:
        UserError: the column is missing or holds something else.
    """
    require_columns(dataset, (column,), role=name)
    value = next((row[column] for row in dataset if row[column] is not None), "")
    if not isinstance(value, str):
        raise UserError(f"{name}: the column {column} holds {_shortened(value)}, which is no text; give strings")


def _text_problem(value: Any) -> str | None:
    """Say what is wrong with a text, or return None."""
    return None if isinstance(value, str) else f"holds {_shortened(value)}, which is no text; give strings"


def _messages_problem(
    value: Any, prompt: Any, tokenizer: "PreTrainedTokenizerBase", rendered: set[tuple[str, ...]]
) -> str | None:
    """Say what is wrong with a list of messages, or return None.

    prompt: the messages before them, since a template may require that roles alternate.
    rendered: sequences of roles that the template has rendered; extended here.
    """
    from jinja2 import TemplateError

    if not is_conversation(value):
        return f"holds {_shortened(value)}, which is no list of messages; give [{{'role': ..., 'content': ...}}, ...]"
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("content"), str)):
            return f"holds the message {_shortened(message)}, whose content is no text; give a string"
    messages = [*(prompt if is_conversation(prompt) else []), *value]
    roles = tuple(str(message["role"]) for message in messages)
    if roles in rendered:
        return None
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        return f"cannot be rendered by the chat template: {error}"
    rendered.add(roles)
    return None


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def keep_fitting_prompts(
    dataset: Any, tokenizer: "PreTrainedTokenizerBase", limit: int | None, *, drop: bool = False, name: str = "dataset"
) -> Any:
    """Return the rows whose `prompt` leaves room for at least one more token within `limit` tokens.

    drop: leave out prompts that are too long, with a warning. limit: None keeps every row.

    Raises:
        UserError: a prompt is too long (without `drop`), or all of them are.
    """
    if limit is None:
        return dataset
    sizes = [_tokens_if_too_long(row["prompt"], tokenizer, limit) for row in dataset]
    too_long = [index for index, size in enumerate(sizes) if size]
    if not too_long:
        return dataset
    if drop and len(too_long) < len(sizes):
        logger.warning(
            "%s: dropped %d of %d prompts, which have %d tokens or more", name, len(too_long), len(sizes), limit
        )
        return dataset.select([index for index, size in enumerate(sizes) if not size])
    raise UserError(
        f"{name}, row {too_long[0]}: the prompt has {sizes[too_long[0]]} tokens, which leaves no room for an answer "
        f"within {limit} ({len(too_long)} of {len(sizes)} rows are too long); shorten them, raise --max_length up to "
        "the model's context, or leave them out with --too_long drop"
    )


def check_and_fit_rows(
    dataset: Any,
    columns: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None,
    *,
    drop: bool = False,
    name: str = "dataset",
) -> Any:
    """Return the rows with `columns` alone, checked to be text or messages, and to leave room for an answer.

    Raises:
        UserError: as `require_columns`, `require_texts` and `keep_fitting_prompts`.
    """
    require_columns(dataset, columns, role=name)
    dataset = dataset.select_columns(list(columns))
    require_texts(dataset, columns, tokenizer, name)
    return keep_fitting_prompts(dataset, tokenizer, limit, drop=drop, name=name) if "prompt" in columns else dataset


def _tokens_if_too_long(prompt: Any, tokenizer: "PreTrainedTokenizerBase", limit: int) -> int:
    """Return the number of tokens if it is at least `limit`, else 0.

    A token is at least one byte, so most prompts need no tokenizing.
    """
    if len(prompt_text(prompt, tokenizer).encode("utf-8")) < limit - len(bos_prefix(tokenizer)):
        return 0
    size = len(prompt_ids(prompt, tokenizer))
    return size if size >= limit else 0
