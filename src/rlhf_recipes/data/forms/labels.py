"""Labels of any kind as 1 (good) and 0 (bad)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.forms.survey import MOST_VALUES, is_missing

GOOD = {
    "positive", "pos", "good", "yes", "true", "safe", "non-toxic", "nontoxic", "not toxic", "non_toxic", "helpful", "ham",
    "not spam", "correct", "acceptable", "preferred", "like", "clean", "harmless", "fresh", "entailment",
    "y", "desirable", "thumbs_up", "thumbs up", "upvote", "chosen", "accepted", "正面", "积极", "好评",
}  # fmt: skip
BAD = {
    "negative", "neg", "bad", "no", "false", "unsafe", "toxic", "hate", "hateful", "spam", "offensive", "insult", "harmful",
    "incorrect", "unacceptable", "dislike", "obscene", "threat", "rejected", "rotten", "abusive", "unhelpful",
    "n", "undesirable", "thumbs_down", "thumbs down", "downvote", "负面", "消极", "差评",
}  # fmt: skip
BAD_COLUMN = re.compile(
    r"(?<!non_)(?<!not_)(?<!no_)(?<![a-z])(toxic|toxicity|spam|hate|hateful|unsafe|offensive|harmful|insult|obscene|threat)(_|$)",
    re.IGNORECASE,
)


class LabelReader:
    """Turns the labels of one column into 1 and 0.

    Args:
        column: the column's name; a name such as ``toxic`` says that 1 is bad.
        values: the distinct labels.
        names: the class names of a ClassLabel column.
        positive: the labels that are good, as the user gave them.
        threshold: numbers from here on are good, or bad in a column named for the bad.
        name: the source in messages.

    Raises:
        UserError: it cannot be known which labels are good; the message names the flag.
    """

    def __init__(
        self,
        column: str,
        values: Iterable[Any],
        *,
        names: Sequence[str] | None = None,
        positive: Sequence[str] | None = None,
        threshold: float | None = None,
        name: str = "dataset",
    ) -> None:
        self.column, self.names, self.name = column, names, name
        self.positive, self.threshold = positive, threshold
        shown = {self._shown(value) for value in values if not is_missing(value)}
        self.meaning = self._meaning(shown)

    def __call__(self, value: Any, index: int) -> int:
        """Return 1 or 0.

        Raises:
            UserError: a label that was not among the values.
        """
        shown = self._shown(value)
        if self.threshold is not None:
            return int(self._above(shown))
        if self.positive is not None:
            return int(shown.lower() in {self._shown(each).lower() for each in self.positive})
        if shown not in self.meaning:
            raise UserError(f"{self.name}, row {index}: the label {value!r} is not known; fix or drop the row")
        return self.meaning[shown]

    def __str__(self) -> str:
        sides = ([each for each, label in self.meaning.items() if label == side] for side in (1, 0))
        good, bad = (", ".join(sorted(side)[:4]) + (", ..." if len(side) > 4 else "") for side in sides)
        return f"{good} good, {bad} bad"

    def _shown(self, value: Any) -> str:
        """Return a label as text: the class's name, ``true`` or ``false``, a number without a useless ``.0``."""
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int) and self.names and 0 <= value < len(self.names):
            return self.names[value]
        number = _number(value)
        return str(value).strip() if number is None else f"{number:g}"

    def _meaning(self, shown: set[str]) -> Mapping[str, int]:
        if self.threshold is not None:
            return {each: int(self._above(each)) for each in shown}
        if self.positive is not None:
            wanted = {self._shown(each).lower() for each in self.positive}
            if unknown := wanted - {each.lower() for each in shown}:
                raise UserError(
                    f"positive_label {', '.join(sorted(unknown))} is no label of {self.name}, which has "
                    f"{', '.join(sorted(shown)[:MOST_VALUES])}"
                )
            return {each: int(each.lower() in wanted) for each in shown}
        lower = {each: each.lower() for each in shown}
        bad_column = bool(BAD_COLUMN.search(self.column))
        if set(lower.values()) <= {"0", "1", "true", "false"}:
            return {each: int((value in ("1", "true")) != bad_column) for each, value in lower.items()}
        if bad_column and set(lower.values()) <= {"yes", "no", "y", "n"}:
            return {each: int(value in ("no", "n")) for each, value in lower.items()}
        if set(lower.values()) == {"-1", "1"} and not bad_column:
            return {each: int(value == "1") for each, value in lower.items()}
        sides = {each: 1 if value in GOOD else 0 if value in BAD else None for each, value in lower.items()}
        known = {side for side in sides.values() if side is not None}
        if None not in sides.values() and len(sides) <= 2:
            return {each: int(side or 0) for each, side in sides.items()}
        if len(sides) == 2 and len(known) == 1:  # the other one is its opposite
            return {each: 1 - next(iter(known)) if side is None else side for each, side in sides.items()}
        raise UserError(self._unknown(shown))

    def _above(self, shown: str) -> bool:
        number = _number(shown)
        if number is None:
            raise UserError(f"label_threshold compares numbers, and {self.name} has the label {shown!r}")
        return (number >= (self.threshold or 0.0)) != bool(BAD_COLUMN.search(self.column))

    def _unknown(self, shown: set[str]) -> str:
        numbers = all(_number(each) is not None for each in shown)
        some = sorted(shown, key=lambda each: (_number(each) or 0.0, each))
        listed = ", ".join(some[:8]) + (", ..." if len(some) > 8 else "")
        is_bad = bool(BAD_COLUMN.search(self.column))
        example = some[-1] if some else "1"
        best = some[0] if some and is_bad else example
        quoted = f"'{best}'" if " " in best else best
        side = "bad" if is_bad else "good"
        flags = f"--label_threshold {example} (labels from {example} on are {side}) or " if numbers else ""
        if shown == {"-1"}:
            return (
                f"{self.name} has the label -1 in every row, as splits without labels have; give another split, for example "
                "--dataset_test_split validation"
            )
        return (
            f"{self.name}: which labels of the column {self.column} are good is not known (it has {listed}); pass {flags}"
            f"--positive_label {quoted}"
        )


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    try:
        return float(str(value).strip())
    except ValueError:
        return None
