"""What rows must be before a model is loaded for them. Every check names the row or the column that is wrong."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.arguments import UserError
from rlhf_recipes.data.chat import ensure_chat_template, is_conversation, prompt_ids, prompt_text
from rlhf_recipes.data.sources import first_row

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
    for index, row in enumerate(dataset):
        for column in columns:
            fault = _fault_of_messages(row[column], tokenizer) if chat[column] else _fault_of_text(row[column])
            if fault:
                raise UserError(f"{name}, row {index}: the column {column} {fault}")
        if not chat[columns[0]] and "prompt" in columns and not row["prompt"]:
            raise UserError(f"{name}, row {index}: the prompt is empty; drop the row")


def _fault_of_text(value: Any) -> str | None:
    return None if isinstance(value, str) else f"holds {_short(value)}, which is no text; give strings"


def _fault_of_messages(value: Any, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    from jinja2 import TemplateError

    if not is_conversation(value):
        return f"holds {_short(value)}, which is no list of messages; give [{{'role': ..., 'content': ...}}, ...]"
    for message in value:
        if not (isinstance(message, Mapping) and isinstance(message.get("content"), str)):
            return f"holds the message {_short(message)} without a text as its content"
    try:
        tokenizer.apply_chat_template(list(value), tokenize=False)
    except TemplateError as error:
        return f"cannot be rendered by the chat template: {error}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fit_prompts(
    dataset: Any, tokenizer: "PreTrainedTokenizerBase", limit: int | None, *, drop: bool = False, name: str = "dataset"
) -> Any:
    """The rows whose `prompt` leaves room for at least one more token within `limit` tokens.

    Raises:
        UserError: a prompt is too long (without `drop`), or all of them are.
    """
    if limit is None:
        return dataset
    long = [(index, size) for index, row in enumerate(dataset) if (size := _tokens_from(row["prompt"], tokenizer, limit))]
    if not long:
        return dataset
    if drop and len(long) < len(dataset):
        logger.warning("%s: left out %d of %d rows whose prompts do not fit %d tokens", name, len(long), len(dataset), limit)
        left_out = {index for index, _ in long}
        return dataset.select([index for index in range(len(dataset)) if index not in left_out])
    index, size = long[0]
    raise UserError(
        f"{name}, row {index}: the prompt has {size} tokens, which leaves no room for an answer within {limit} "
        f"({len(long)} of {len(dataset)} rows are too long); shorten them, raise --max_length up to the model's context, "
        "or leave them out with --drop_long_prompts true"
    )


def _tokens_from(prompt: Any, tokenizer: "PreTrainedTokenizerBase", limit: int) -> int:
    """The number of tokens if it is at least `limit`, else 0. A token is at least a byte, so most need no tokenizing."""
    if len(prompt_text(prompt, tokenizer).encode("utf-8")) < limit:
        return 0
    size = len(prompt_ids(prompt, tokenizer))
    return size if size >= limit else 0
