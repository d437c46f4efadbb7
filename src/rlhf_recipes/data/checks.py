"""What rows must be before a model is loaded for them. Every check names the row or the column that is wrong."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import bos_prefix, ensure_chat_template, is_conversation, prompt_ids, prompt_text
from rlhf_recipes.data.sources import first_row, require_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

logger = logging.getLogger(__name__)


def require_batch(rows: int, training: "TrainingArguments", role: str = "the training split") -> None:
    """Refuse rows too few for one optimizer step: Trainer would drop or shrink the batch without a word."""
    sizes = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.world_size)
    needed = sizes[0] * sizes[1] * sizes[2]
    if rows < needed:
        raise UserError(
            f"{role} has {rows} rows, but one batch takes {needed} (per_device_train_batch_size {sizes[0]} x "
            f"gradient_accumulation_steps {sizes[1]} x {sizes[2]} processes); give more rows or lower one of these"
        )


def require_held_out(dataset: Any, training: "TrainingArguments", split: str) -> None:
    """Refuse an evaluation on rows that there are not."""
    if dataset is None and training.eval_strategy != "no":
        raise UserError(
            f"eval_strategy is {getattr(training.eval_strategy, 'value', training.eval_strategy)}, but the dataset has no "
            f"split {split!r}; name one with --dataset_test_split, or pass --eval_strategy no"
        )


def require_texts(
    dataset: Any, columns: Sequence[str], tokenizer: "PreTrainedTokenizerBase", name: str = "dataset"
) -> None:
    """Every value of `columns` is text, or every one is a list of messages that the chat template can render.

    Raises:
        UserError: naming the first row that is neither, is empty where it must not be, or has an unknown role.
    """
    first = first_row(dataset) or {}
    chat = {column: is_conversation(first[column]) for column in columns}
    if len(set(chat.values())) > 1:
        kinds = ", ".join(f"{column} holds {'messages' if chat[column] else 'text'}" for column in columns)
        raise UserError(f"{name} mixes forms: {kinds}; give all of them as text or all as messages")
    if any(chat.values()):
        ensure_chat_template(tokenizer)
    rendered: set[tuple[str, ...]] = set()
    for index, row in enumerate(dataset):
        for column in columns:
            value = row[column]
            before = row["prompt"] if chat[column] and column != "prompt" and "prompt" in columns else []
            fault = _messages_problem(value, before, tokenizer, rendered) if chat[column] else _text_problem(value)
            if fault:
                raise UserError(f"{name}, row {index}: the column {column} {fault}")
        if not chat[columns[0]] and "prompt" in columns and not row["prompt"]:
            raise UserError(f"{name}, row {index}: the prompt is empty; drop the row")


def require_text(dataset: Any, column: str, name: str = "dataset") -> None:
    """The column is there and holds text; a row may hold nothing."""
    require_columns(dataset, (column,), role=name)
    value = next((row[column] for row in dataset if row[column] is not None), "")
    if not isinstance(value, str):
        raise UserError(f"{name}: the column {column} holds {_short(value)}, which is no text; give strings")


def _text_problem(value: Any) -> str | None:
    return None if isinstance(value, str) else f"holds {_short(value)}, which is no text; give strings"


def _messages_problem(
    value: Any, before: Any, tokenizer: "PreTrainedTokenizerBase", rendered: set[tuple[str, ...]]
) -> str | None:
    """What is wrong with the messages, or None. before: those of the prompt, which they answer: a template may ask that
    roles alternate. rendered: orders of roles that it is known to take."""
    from jinja2 import TemplateError

    if not is_conversation(value):
        return f"holds {_short(value)}, which is no list of messages; give [{{'role': ..., 'content': ...}}, ...]"
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("content"), str)):
            return f"holds the message {_short(message)} without a text as its content"
    whole = [*(before if is_conversation(before) else []), *value]
    roles = tuple(str(message["role"]) for message in whole)
    if roles in rendered:
        return None
    try:
        tokenizer.apply_chat_template(whole, tokenize=False)
    except TemplateError as error:
        return f"cannot be rendered by the chat template: {error}"
    rendered.add(roles)
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def keep_fitting_prompts(
    dataset: Any, tokenizer: "PreTrainedTokenizerBase", limit: int | None, *, drop: bool = False, name: str = "dataset"
) -> Any:
    """The rows whose `prompt` leaves room for at least one more token within `limit` tokens.

    Raises:
        UserError: a prompt is too long (without `drop`), or all of them are.
    """
    if limit is None:
        return dataset
    sizes = [_tokens_from(row["prompt"], tokenizer, limit) for row in dataset]
    long = [index for index, size in enumerate(sizes) if size]
    if not long:
        return dataset
    if drop and len(long) < len(sizes):
        logger.warning("%s: %d of %d prompts do not fit %d tokens; left out", name, len(long), len(sizes), limit)
        return dataset.select([index for index, size in enumerate(sizes) if not size])
    raise UserError(
        f"{name}, row {long[0]}: the prompt has {sizes[long[0]]} tokens, which leaves no room for an answer within "
        f"{limit} ({len(long)} of {len(sizes)} rows are too long); shorten them, raise --max_length up to the model's "
        "context, or leave them out with --drop_long_prompts true"
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
    """The rows in `columns` alone, each checked to be text or messages, and to leave room for an answer.

    Raises:
        UserError: as `require_columns`, `require_texts` and `keep_fitting_prompts`.
    """
    require_columns(dataset, columns, role=name)
    dataset = dataset.select_columns(list(columns))
    require_texts(dataset, columns, tokenizer, name)
    return keep_fitting_prompts(dataset, tokenizer, limit, drop=drop, name=name) if "prompt" in columns else dataset


def _tokens_from(prompt: Any, tokenizer: "PreTrainedTokenizerBase", limit: int) -> int:
    """The number of tokens if it is at least `limit`, else 0. A token is a byte or more, so few need tokenizing."""
    if len(prompt_text(prompt, tokenizer).encode("utf-8")) < limit - len(bos_prefix(tokenizer)):
        return 0
    size = len(prompt_ids(prompt, tokenizer))
    return size if size >= limit else 0
