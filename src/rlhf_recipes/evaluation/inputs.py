"""The inputs of every compared model: prompts that leave room for an answer, their columns, and texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import RowCounts, column_prompt_ids, fit_rows, is_ids, log_first_row, readable_prompts, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvalInputs:
    """The inputs of every model.

    columns: the other columns of the prompts' dataset. max_prompt_tokens: of each model; longer prompts are cut.
    """

    prompts: list[Any]
    columns: dict[str, list[Any]]
    texts: list[str]
    max_prompt_tokens: list[int | None] = field(default_factory=list)
    counts: RowCounts = field(default_factory=lambda: RowCounts("the prompts"))

    def prompts_for(self, tokenizer: "PreTrainedTokenizerBase", first: "PreTrainedTokenizerBase") -> list[Any]:
        """Return the prompts for a model; ids of the first model's tokenizer are text for one with another vocabulary."""
        if not any(is_ids(prompt) for prompt in self.prompts) or tokenizer.get_vocab() == first.get_vocab():
            return self.prompts
        return readable_prompts(self.prompts, first)


def fit_inputs(
    inputs: EvalInputs,
    tokenizers: "Sequence[PreTrainedTokenizerBase]",
    contexts: Sequence[tuple[str, int | None]],
    max_new_tokens: int,
    too_long: str | None,
) -> EvalInputs:
    """Return the inputs with the prompts that leave room for an answer in the context of every model.

    Args:
        tokenizers: of each model.
        contexts: the name of each model and its context in tokens; None: no limit.
        max_new_tokens: longest answer in tokens.
        too_long: drop a prompt for all models, cut it to its last tokens, or error (None).

    Raises:
        UserError: a prompt is too long (with error), or none is left.
    """
    counts = inputs.counts
    counts["read"] = len(inputs.prompts)
    limits: list[int | None] = []
    kept = list(range(len(inputs.prompts)))
    for (name, context), tokenizer in zip(contexts, tokenizers, strict=True):
        limit = None if context is None else max(context - max_new_tokens, 0)
        encoded = column_prompt_ids(inputs.prompts_for(tokenizer, tokenizers[0]), inputs.columns, tokenizer)
        longest = max(len(ids) for ids in encoded)
        if not limits:
            log_first_row(encoded[0], tokenizer, "first prompt")
        if limit is not None and longest > limit and too_long in (None, "error"):
            raise UserError(
                f"a prompt of {longest} tokens and an answer of {max_new_tokens} do not fit the context of model {name} "
                f"({context} tokens); pass --too_long drop (or cut), or lower --max_new_tokens"
            )
        rows = [{"row": index, "prompt_ids": encoded[index]} for index in kept]
        kept = [row["row"] for row in fit_rows(rows, limit, too_long or "error", counts, unit="prompt")]
        limits.append(limit if too_long == "cut" else None)
    counts["used"] = len(kept)
    columns = {name: [values[index] for index in kept] for name, values in inputs.columns.items()}
    prompts = [inputs.prompts[index] for index in kept]
    return replace(inputs, prompts=prompts, columns=columns, max_prompt_tokens=limits)


def evenly_spaced(rows: Any, count: int | None) -> Any:
    """Return evenly spaced rows: many datasets are sorted by label, and their first rows have one label."""
    if count is None or count >= len(rows):
        return rows
    return rows.select([place * len(rows) // count for place in range(count)])


def first_tokens(prompt: Any, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> list[int]:
    """Return the first tokens of a prompt given as text.

    Raises:
        UserError: the prompt is given as messages or ids.
    """
    if not isinstance(prompt, str):
        raise UserError("prompt_tokens cuts text; the prompts are messages or ids, so leave it out")
    return text_ids(prompt, tokenizer)[:tokens]
