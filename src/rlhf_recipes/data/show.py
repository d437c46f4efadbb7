"""Rows as the model reads them, printed for a person: the rendered text, the tokens with loss, the lengths."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from rlhf_recipes.core.processes import log_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS_COLOUR, RESET, FAINT = "\x1b[30;42m", "\x1b[0m", "\x1b[2m"
MARKS = ("[[", "]]")  # around tokens with loss where there are no colours
FIRST_TOKENS = 100  # of the first row, in the log
LONGEST = 1500  # characters of one row; the middle of a longer one is left out


@dataclass(frozen=True)
class ShownRow:
    """One row of token ids.

    title: what it is, such as ``chosen``. ids: its tokens. loss: which of them have loss; None: none. note: what else is
    known about it, such as a label. counts_loss: the marked tokens have loss, and their number is shown.
    """

    title: str
    ids: Sequence[int]
    loss: Sequence[bool] | None = None
    note: str = ""
    counts_loss: bool = True


def show_rows(
    rows: Sequence[ShownRow],
    tokenizer: "PreTrainedTokenizerBase",
    stream: TextIO | None = None,
    colours: bool | None = None,
) -> None:
    """Print rows: a heading with the length and the number of tokens with loss, then the text with these tokens marked.

    Args:
        tokenizer: the model's.
        stream: where to print; standard output by default.
        colours: mark with colours rather than brackets. None: if the stream is a terminal and NO_COLOR is not set.
    """
    stream = stream or sys.stdout
    if colours is None:
        colours = (stream.isatty() or bool(os.environ.get("FORCE_COLOR"))) and not os.environ.get("NO_COLOR")
    begin, end = (LOSS_COLOUR, RESET) if colours else MARKS
    if any(row.loss is not None for row in rows):
        print(f"{begin}marked{end}: tokens with loss, or the one that is scored", file=stream)
    for row in rows:
        loss = list(row.loss) if row.loss is not None else [False] * len(row.ids)
        parts = [
            f"{len(row.ids)} tokens",
            f"{sum(loss)} with loss" if row.loss is not None and row.counts_loss else "",
            row.note,
        ]
        heading = f"-- {row.title}: {', '.join(part for part in parts if part)}"
        print(f"\n{FAINT}{heading}{RESET}" if colours else f"\n{heading}", file=stream)
        print(
            "".join(f"{begin}{text}{end}" if has else text for text, has in _spans(row.ids, loss, tokenizer)),
            file=stream,
        )


def log_first_row(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", what: str = "first row") -> None:
    """Print the first row of a run, as its model reads it, in one line on stderr."""
    text = str(
        tokenizer.decode(list(ids[:FIRST_TOKENS]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    more = f" ... ({len(ids)} tokens)" if len(ids) > FIRST_TOKENS else ""
    log_line(f"{what}: {text!r}{more}")


def _spans(ids: Sequence[int], loss: Sequence[bool], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, bool]]:
    """Return the text of each unbroken span with or without loss, decoded in the context of what precedes it."""
    spans: list[tuple[str, bool]] = []
    start, before = 0, ""
    for has, group in groupby(loss):
        start += len(list(group))
        whole = str(tokenizer.decode(list(ids[:start]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        spans.append((_shortened(whole[len(before) :]), has))
        before = whole
    return spans


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"
