"""What a stage asks of the rows that it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FormOptions:
    """How rows are turned into canonical ones.

    Args:
        forms: what the stage reads, the preferred form first.
        keep_columns: other columns stay beside the canonical ones.
        positive_label, label_threshold: which labels are good.
        margin: the stage learns from a column `margin`.
        score_margin: differences of scores become margins.
        tokenizer: the model's; end tokens of other models are taken away.
        any_text: all texts of a row are read, whatever its form.
        text_prompts: a text serves as a prompt.
        columns: meaning -> column, from flags of the stage beside `--columns`.
    """

    forms: tuple[str, ...]
    keep_columns: bool = False
    positive_label: Sequence[str] | None = None
    label_threshold: float | None = None
    margin: bool = False
    score_margin: bool = False
    tokenizer: "PreTrainedTokenizerBase | None" = None
    any_text: bool = False
    text_prompts: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
