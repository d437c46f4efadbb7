"""Checks of dataset rows, made before a model is loaded. Every message names the row or the column that is wrong."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError, shortened
from rlhf_recipes.data.chat import ensure_chat_template_, is_conversation
from rlhf_recipes.data.rows import first_row, require_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

OPTIONAL_COLUMNS = ("tools", "chat_template_kwargs", "margin")


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


def _text_problem(value: Any) -> str | None:
    """Say what is wrong with a text, or return None."""
    return None if isinstance(value, str) else f"holds {shortened(value)}, which is no text; give strings"


def _messages_problem(
    value: Any, prompt: Any, tokenizer: "PreTrainedTokenizerBase", rendered: set[tuple[str, ...]]
) -> str | None:
    """Say what is wrong with a list of messages, or return None.

    prompt: the messages before them, since a template may require that roles alternate.
    rendered: sequences of roles that the template has rendered; extended here.
    """
    from jinja2 import TemplateError

    if not is_conversation(value):
        return f"holds {shortened(value)}, which is no list of messages; give [{{'role': ..., 'content': ...}}, ...]"
    for message in value:
        calls = isinstance(message, Mapping) and (message.get("tool_calls") or message.get("function_call"))
        if not (isinstance(message, Mapping) and (isinstance(message.get("content"), str) or calls)):
            return f"holds the message {shortened(message)}, whose content is no text; give a string"
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


def check_rows(
    dataset: Any, columns: Sequence[str], tokenizer: "PreTrainedTokenizerBase", name: str = "dataset"
) -> Any:
    """Return the rows with `columns` and those for the chat template alone, checked to be text or messages.

    Raises:
        UserError: as `require_columns` and `require_texts`.
    """
    require_columns(dataset, columns, role=name)
    present = [column for column in OPTIONAL_COLUMNS if column in dataset.column_names]
    dataset = dataset.select_columns([*columns, *present])
    require_texts(dataset, columns, tokenizer, name)
    return dataset
