"""The prompts of a dataset as token ids, checked once and for all before training."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rlhf_recipes.arguments import UserError
from rlhf_recipes.data import first_row, prompt_ids, require_columns, text_of
from rlhf_recipes.models import context_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class Prompts:
    """Rows with a `prompt` (text, messages or ids), or with `input_ids`; every other column is kept for the rewards.

    Raises:
        UserError: no rows, no such column, an empty prompt, or one that leaves no room for an answer in the context.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: "PreTrainedTokenizerBase",
        config: "PretrainedConfig",
        response_length: int,
        role: str = "dataset",
    ) -> None:
        if dataset is None or first_row(dataset) is None:
            raise UserError(f"{role} has no rows; give a dataset with a column `prompt`")
        (self.column,) = require_columns(dataset, ["prompt"], ["input_ids"], role=role)
        self.dataset = dataset if "__getitem__" in dir(dataset) else list(dataset)
        self.ids = [prompt_ids(row[self.column], tokenizer) for row in self.dataset]
        self.columns = [name for name in self.dataset[0] if name not in ("prompt", "input_ids", "attention_mask")]
        limit = context_length(config)
        longest = max(range(len(self.ids)), key=lambda index: len(self.ids[index]))
        if limit is not None and len(self.ids[longest]) + response_length > limit:
            raise UserError(
                f"{role} row {longest} has a prompt of {len(self.ids[longest])} tokens; with an answer of "
                f"{response_length} it does not fit the model's context of {limit}; shorten one of them "
                f"({text_of(self.dataset[longest][self.column])[:60]!r}...)"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: Iterable[int]) -> dict[str, Any]:
        """``prompts``, their ``prompt_ids``, and ``columns``: each other column as a list."""
        indices = list(indices)
        chosen = [self.dataset[index] for index in indices]
        return {
            "prompts": [row[self.column] for row in chosen],
            "prompt_ids": [self.ids[index] for index in indices],
            "columns": {name: [row[name] for row in chosen] for name in self.columns},
        }
