"""The prompts of a dataset as token ids, checked once before training."""

import numbers
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.conversion import to_python
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import is_conversation, plain_text, template_options
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.encoding import prompt_ids
from rlhf_recipes.data.fitting import fit_rows
from rlhf_recipes.data.forms import LoadedRows
from rlhf_recipes.data.rows import first_row, require_columns
from rlhf_recipes.data.show import log_first_row

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
    lacks is None in that row. The columns `tools` and `chat_template_kwargs` go to the chat template, too.

    Args:
        dataset: rows; a stream is read into memory.
        context: the model's context in tokens; None: no limit.
        response_length: tokens that an answer may take.
        role: what messages call the dataset.
        too_long: drop leaves out the prompts without room for an answer, cut keeps their last tokens.
        counts: gets the numbers of rows that were dropped and cut.

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
        too_long: str = "error",
        counts: RowCounts | None = None,
    ) -> None:
        if dataset is None or first_row(dataset) is None:
            raise UserError(f"{role} has no rows; give a dataset with a column `prompt`")
        (self.column,) = require_columns(dataset, ["prompt"], ["input_ids"], role=role)
        self.dataset = dataset if "__len__" in dir(dataset) else list(dataset)  # a stream is read once
        ids: list[list[int]] = []
        names: dict[str, None] = {}
        for index, row in enumerate(self.dataset):
            prompt = read_prompt(row, self.column, f"{role} row {index}")
            ids.append(prompt_ids(prompt, tokenizer, **template_options(row)))
            names |= dict.fromkeys(row)
        self.columns = [name for name in names if name not in RESERVED_COLUMNS]
        limit = None if context is None else max(context - response_length, 0)
        longest = max(range(len(ids)), key=lambda index: len(ids[index]))
        if limit is not None and too_long == "error" and len(ids[longest]) > limit:
            raise UserError(
                f"{role} row {longest} has a prompt of {len(ids[longest])} tokens; with an answer of "
                f"{response_length} it does not fit the model's context of {context}; shorten one of them, or leave such "
                f"prompts out with --too_long drop ({plain_text(self.dataset[longest][self.column])[:60]!r}...)"
            )
        counts = RowCounts(role) if counts is None else counts
        counts["read"] = counts["read"] or len(ids)
        rows = [{"row": index, "prompt_ids": each} for index, each in enumerate(ids)]
        fitting = fit_rows(rows, limit, too_long, counts, unit="prompt")
        self.kept: list[int] = [row["row"] for row in fitting]  # rows of the dataset
        self.ids: list[list[int]] = [row["prompt_ids"] for row in fitting]
        counts["used"] = len(self.kept)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: Iterable[int]) -> dict[str, Any]:
        """Return ``prompts``, their ``prompt_ids``, and ``columns``: each other column as a list."""
        indices = list(indices)
        rows = [self.dataset[self.kept[index]] for index in indices]
        return {
            "prompts": [read_prompt(row, self.column) for row in rows],
            "prompt_ids": [self.ids[index] for index in indices],
            "columns": {name: [row.get(name) for row in rows] for name in self.columns},
        }


def prompts_by_split(
    rows: LoadedRows,
    tokenizer: "PreTrainedTokenizerBase",
    room: tuple[int | None, int],
    too_long: str | None,
) -> tuple[Prompts, Prompts | None]:
    """Read the prompts of the training split and of the held-out split, if there is one; their counts are filled in.

    Args:
        room: the model's context (None: no limit) and the length of an answer, in tokens.
        too_long: drop, cut or error (None), see `Prompts`.

    Raises:
        UserError: as `Prompts`.
    """
    prompts = []
    for dataset, counts in zip((rows.train, rows.test), rows.counts.values(), strict=False):
        prompts.append(Prompts(dataset, tokenizer, *room, counts.name, too_long or "error", counts))
    log_first_row(prompts[0].ids[0], tokenizer, "first prompt")
    return prompts[0], prompts[1] if len(prompts) > 1 else None


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
