"""The prompts of a dataset as token ids, checked once before training."""

import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.conversion import to_python
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import is_conversation, plain_text, prompt_ids
from rlhf_recipes.data.rows import first_row, require_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Not passed to rewards as columns: the prompt itself, and names of a reward's other arguments.
RESERVED_COLUMNS = {
    "prompt",
    "input_ids",
    "attention_mask",
    "prompts",
    "prompt_ids",
    "completions",
    "completion_ids",
    "self",
}


class Prompts:
    """Rows with a `prompt` (text, messages or ids) or with `input_ids`; rewards get every other column.

    Ids may be tensors or arrays. An `attention_mask` beside `input_ids` marks padding with 0. A column that a row
    lacks is None in that row.

    Args:
        dataset: rows; a stream is read into memory.
        context: the model's context in tokens; None: no limit.
        response_length: tokens that an answer may take.
        role: what messages call the dataset.

    Raises:
        UserError: no rows, no such column, an empty prompt, or one that leaves no room for an answer in the context.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: "PreTrainedTokenizerBase",
        context: int | None,
        response_length: int,
        role: str = "dataset",
    ) -> None:
        if dataset is None or first_row(dataset) is None:
            raise UserError(f"{role} has no rows; give a dataset with a column `prompt`")
        (self.column,) = require_columns(dataset, ["prompt"], ["input_ids"], role=role)
        self.dataset = dataset if "__len__" in dir(dataset) else list(dataset)  # a stream is read once
        self.ids: list[list[int]] = []
        names: dict[str, None] = {}
        for index, row in enumerate(self.dataset):
            self.ids.append(prompt_ids(read_prompt(row, self.column, f"{role} row {index}"), tokenizer))
            names |= dict.fromkeys(row)
        self.columns = [name for name in names if name not in RESERVED_COLUMNS]
        longest = max(range(len(self.ids)), key=lambda index: len(self.ids[index]))
        if context is not None and len(self.ids[longest]) + response_length > context:
            raise UserError(
                f"{role} row {longest} has a prompt of {len(self.ids[longest])} tokens; with an answer of "
                f"{response_length} it does not fit the model's context of {context}; shorten one of them "
                f"({plain_text(self.dataset[longest][self.column])[:60]!r}...)"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: Iterable[int]) -> dict[str, Any]:
        """Return ``prompts``, their ``prompt_ids``, and ``columns``: each other column as a list."""
        indices = list(indices)
        rows = [self.dataset[index] for index in indices]
        return {
            "prompts": [read_prompt(row, self.column) for row in rows],
            "prompt_ids": [self.ids[index] for index in indices],
            "columns": {name: [row.get(name) for row in rows] for name in self.columns},
        }


def read_prompt(row: Mapping[str, Any], column: str, place: str = "a row") -> Any:
    """Return the prompt of a row as text, as messages, or as a list of ids without padding.

    Raises:
        UserError: it is none of them, or empty; the message begins with `place`.
    """
    prompt, mask = to_python(row.get(column)), to_python(row.get("attention_mask") if column == "input_ids" else None)
    if isinstance(prompt, str) or (
        is_conversation(prompt) and all(isinstance(message.get("content"), str) for message in prompt)
    ):
        return prompt
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(token, numbers.Integral) for token in prompt):
        raise UserError(f"{place} has the prompt {str(prompt)[:60]!r}; give text, messages or token ids")
    if mask is not None and len(mask) != len(prompt):
        raise UserError(
            f"{place} has {len(prompt)} input_ids and an attention_mask of {len(mask)}; give both the same length"
        )
    ids = [int(token) for token, real in zip(prompt, mask or [1] * len(prompt), strict=True) if real]
    if not ids:
        raise UserError(f"{place} has an empty prompt, which cannot be continued; drop it from the dataset")
    return ids
