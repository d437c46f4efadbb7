"""Rows that are too long for the model: dropped, cut, or refused; and encoded rows that teach nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.conversations import NO_LOSS
from rlhf_recipes.data.counts import RowCounts

ANSWERS = ("chosen_ids", "rejected_ids")
Row = Mapping[str, Any]


def row_length(row: Row) -> int:
    """Return the tokens of an encoded row: of `prompt_ids` and of the longest answer, or of `input_ids`."""
    answers = [len(row[name]) for name in (*ANSWERS, "input_ids") if name in row]
    return len(row.get("prompt_ids", ())) + max(answers, default=0)


def cut_row(row: Row, limit: int, keep_end: bool = False) -> dict[str, Any] | None:
    """Return an encoded row with at most `limit` tokens, or None if nothing that is trained on would be left.

    The end is cut off: of the answers, of the text. A prompt without an answer keeps its last tokens instead.

    keep_end: cut off the beginning of `input_ids` and `labels`.
    """
    cut = dict(row)
    if "prompt_ids" in row:
        prompt = row["prompt_ids"]
        if not any(name in row for name in ANSWERS):
            return cut | {"prompt_ids": prompt[-limit:]} if limit > 0 else None
        room = limit - len(prompt)
        return cut | {name: row[name][:room] for name in ANSWERS if name in row} if room > 0 else None
    part = slice(-limit, None) if keep_end else slice(None, limit)
    for name in (*ANSWERS, "input_ids"):
        if name in row:
            cut[name] = row[name][part]
    labels = row.get("labels")
    if isinstance(labels, (list, tuple)):
        cut["labels"] = labels[part]
        if all(label == NO_LOSS for label in cut["labels"]):
            return None
    return cut


def fit_rows(
    rows: Any,
    limit: int | None,
    too_long: str,
    counts: RowCounts,
    *,
    unit: str = "row",
    keep_end: bool = False,
) -> Any:
    """Return the encoded rows that have at most `limit` tokens; the others are dropped, cut (see `cut_row`), or an error.

    Args:
        rows: a `Dataset` or a list of rows with `input_ids`, or with `chosen_ids` and `rejected_ids`, or with `prompt_ids`.
        limit: None keeps every row.
        too_long: drop, cut or error.
        counts: of the split; gets `too_long_dropped` and `too_long_cut`.
        unit: what the message of an error calls a row.

    Raises:
        UserError: a row is too long (with error), or no row is left.
    """
    if limit is None:
        return rows
    lengths = [row_length(row) for row in rows]
    long = [index for index, length in enumerate(lengths) if length > limit]
    if not long:
        return rows
    if too_long == "error":
        raise UserError(
            f"{counts.name}, row {long[0]}: the {unit} has {lengths[long[0]]} tokens, more than the {limit} that fit "
            f"({len(long)} of {len(lengths)} rows are too long); shorten them, or pass --too_long drop or --too_long cut"
        )
    shorter = {index: cut_row(rows[index], limit, keep_end) for index in long} if too_long == "cut" else {}
    replaced = {index: row for index, row in shorter.items() if row is not None}
    dropped = len(long) - len(replaced)
    reason = "have nothing to train on within" if too_long == "cut" else "are longer than"
    advice = "shorten them, raise --max_length up to the model's context" + (
        "" if too_long == "cut" else ", or pass --too_long cut"
    )
    if dropped == len(lengths):
        raise UserError(f"{counts.name}: all {len(lengths)} rows {reason} {limit} tokens; {advice}")
    counts.report("too_long_cut", len(replaced), f"are longer than {limit} tokens and are cut, so they lose their end")
    counts.report("too_long_dropped", dropped, f"{reason} {limit} tokens and are dropped; {advice}")
    kept = [index for index, length in enumerate(lengths) if length <= limit or index in replaced]
    if isinstance(rows, list):
        return [replaced.get(index, rows[index]) for index in kept]
    if not replaced:
        return rows.select(kept)
    cut = rows.map(lambda row, index: replaced.get(index, row), with_indices=True, desc="Cutting")
    return cut.select(kept)


def drop_rows(
    rows: Any, unwanted: Callable[[Row], bool], counts: RowCounts, kind: str, message: str, advice: str
) -> Any:
    """Return the rows of a `Dataset` without the unwanted ones, which are counted under `kind` and logged with `message`.

    Raises:
        UserError: every row is unwanted; the message ends with `advice`.
    """
    kept = [index for index, row in enumerate(rows) if not unwanted(row)]
    dropped = len(rows) - len(kept)
    if not dropped:
        return rows
    if not kept:
        raise UserError(f"{counts.name}: all {dropped} rows {message}; {advice}")
    counts.report(kind, dropped, f"{message} and are dropped; {advice}")
    return rows.select(kept)


def drop_unhelpful_pairs(pairs: Any, is_empty: Callable[[Sequence[int]], bool], counts: RowCounts) -> Any:
    """Return a `Dataset` of encoded pairs without those whose chosen answer is empty, and those of two equal answers.

    An empty rejected answer is kept: that an answer should say something is learned from it.
    """
    advice = "leave them out of the dataset"
    pairs = drop_rows(
        pairs, lambda row: is_empty(row["chosen_ids"]), counts, "empty_answers", "have an empty chosen answer", advice
    )
    equal = "have equal chosen and rejected answers"
    return drop_rows(pairs, lambda row: row["chosen_ids"] == row["rejected_ids"], counts, "equal_pairs", equal, advice)


def encode_rows(rows: Any, encode: Callable[[Row], Mapping[str, Any]], processes: int | None = None) -> Any:
    """Return a `Dataset` of what `encode` gives for each row, without the columns of the rows.

    processes: that encode in parallel; None: this one.
    """
    return rows.map(encode, remove_columns=rows.column_names, num_proc=processes, desc="Tokenizing")
