"""Which of two answers a vote or a score prefers."""

import re
from collections.abc import Mapping
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.forms.context import Context
from rlhf_recipes.data.forms.survey import is_missing

VOTES = (
    ("a", "model_a", "response_a", "answer_a", "output_a", "assistant_a", "left", "first"),
    ("b", "model_b", "response_b", "answer_b", "output_b", "assistant_b", "right", "second"),
)
TIES = ("both", "neither", "equal", "draw", "none", "bothbad", "both_bad", "both bad")
NO_SCORE = ("", "n/a", "na", "nan", "none", "null")
# From "the first is much better" (negative) to "the second is" (positive); HelpSteer2-Preference (Wang et al. 2024).
STRENGTHS = ("preference_strength", "overall_preference")


def has_no_score(score: Any) -> bool:
    """Return whether a score stands for none, such as ``N/A``."""
    return is_missing(score) or (isinstance(score, str) and score.strip().lower() in NO_SCORE)


def winner(context: Context, row: Mapping[str, Any], index: int) -> int | None:
    """Return 0 or 1 for the winner of a vote or of two scores, None for a tie.

    Raises:
        UserError: the vote names neither answer.
    """
    if "score_a" in context.columns:
        first, second = (_score(context, row, index, side) for side in ("score_a", "score_b"))
        return None if first == second else int(second > first)
    column, value = context.columns["vote"], context.value(row, "vote")
    word = str(value).strip().lower()
    number = _number(word)
    if column.lower() in STRENGTHS and number is not None:
        return None if number == 0 else int(number > 0)
    if word.startswith("tie") or word in TIES:
        return None
    sides = [str(context.columns.get(side)).lower() for side in ("answer_a", "answer_b")]
    models = [str(row.get(name, "")).strip().lower() for name in ("model_a", "model_b")]
    for names in (sides, models):
        if word in names and names[0] != names[1]:
            return names.index(word)
    for side, words in enumerate(VOTES):
        if word in words:
            return side
    if number in (0, 1) and column == "choice" and "answers" in context.columns:
        return int(number)  # the place of the better answer
    if number in (0, 1) and context.columns.get("answer_a") == "human_ref_A":
        _check_scores(context, row, index, int(number))
        return 1 - int(number)  # SHP: 1 means that A is preferred (Ethayarajh et al. 2022)
    ends = [re.sub(r".*?(\d*)$", r"\1", context.columns.get(side, "")) for side in ("answer_a", "answer_b")]
    if number is not None and f"{number:g}" in ends and not column.lower().startswith("label"):
        return ends.index(f"{number:g}")  # the number in the name of the better answer's column
    raise UserError(
        f"{context.place(index, 'vote')} holds {value!r}, which names no answer; give model_a, model_b or tie, or leave it "
        f"out (--ignore_columns {column}) where there are chosen and rejected"
    )


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _score(context: Context, row: Mapping[str, Any], index: int, meaning: str) -> float:
    value = context.value(row, meaning)
    number = _number(str(value))
    if number is None or has_no_score(value):
        raise UserError(f"{context.place(index, meaning)} holds {value!r}, which is no number; drop the row")
    return number


def _check_scores(context: Context, row: Mapping[str, Any], index: int, label: int) -> None:
    first, second = row.get("score_A"), row.get("score_B")
    if first is None or second is None or first == second:
        return
    if (first > second) != bool(label):
        raise UserError(
            f"{context.place(index, 'vote')} prefers {'AB'[1 - label]}, but score_A is {first} and score_B "
            f"{second}; pass --ignore_columns score_A score_B to go by the label"
        )
