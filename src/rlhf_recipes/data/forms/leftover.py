"""Columns that a format does not read: left out with a word in the log, or an error where they carry meaning."""

from collections.abc import Mapping

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.forms.formats import COMPLETION, LABEL, MESSAGES, PREFERENCE
from rlhf_recipes.data.forms.meanings import ABOUT_ROWS, possible_meanings
from rlhf_recipes.data.forms.survey import Column

# Meanings that change what a row teaches; a column of another meaning may be left out.
CARRYING = {
    "messages", "chosen", "rejected", "prompt", "completion", "context", "history", "system", "answers", "margin", "tools",
    "chat_template_kwargs", "weight", "text", "images", "answer_a", "answer_b",
}  # fmt: skip
LABELS = {"label", "labels", "kto_tag"}
SUPERVISED = (COMPLETION, MESSAGES, PREFERENCE, LABEL)


def check_leftover(form: str, left: Mapping[str, Column], meanings: Mapping[str, str], name: str, kept: bool) -> None:
    """Refuse to leave out a column that carries meaning. kept: the columns are passed on to rewards.

    Raises:
        UserError: names the columns and the flags.
    """
    carrying = [
        column
        for column, facts in left.items()
        if not facts.is_blank and _carries(column, facts, form, meanings, kept)
    ]
    if not carrying:
        return
    first = carrying[0]
    if meanings.get("images") in carrying:
        raise UserError(
            f"{name} has the column {meanings['images']}, and only text is read; pass --ignore_columns {' '.join(carrying)} to "
            "train without it"
        )
    use = (
        f", or say what it means (--columns prompt={first})" if form == PREFERENCE and "prompt" not in meanings else ""
    )
    if first.lower() in LABELS and form in (COMPLETION, MESSAGES):
        use = f", or keep the good rows with --row_filter {first}=VALUE"
    raise UserError(
        f"{name}: nothing reads the column{'s' if len(carrying) > 1 else ''} {', '.join(carrying)}; pass --ignore_columns "
        f"{' '.join(carrying)} to train without {'them' if len(carrying) > 1 else 'it'}{use}"
    )


def _carries(column: str, facts: Column, form: str, meanings: Mapping[str, str], kept: bool) -> bool:
    meant = {meaning for meaning, name in meanings.items() if name == column} | possible_meanings(column, facts.kind)
    if "images" in meant:
        return True
    if kept or form not in SUPERVISED:
        return False
    if form == PREFERENCE and column.lower() == "labels" and facts.kind == "list":
        return False  # refused with its own message
    if meant & CARRYING or (column.lower() in LABELS and form != LABEL):
        return True
    text = bool({"text", "messages", "mixed"} & {facts.kind, *facts.kinds})
    return form in (PREFERENCE, LABEL) and text and not ABOUT_ROWS.fullmatch(column)
