"""Columns that a format does not read: left out with a word in the log, or an error where they carry meaning."""

from collections.abc import Mapping

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.forms.formats import COMPLETION, LABEL, MESSAGES, PREFERENCE, TEXT
from rlhf_recipes.data.forms.meanings import is_about_rows, named_after, possible_meanings
from rlhf_recipes.data.forms.messages import quoted
from rlhf_recipes.data.forms.survey import Column

# Meanings that change what a row teaches; a column of another meaning may be left out.
CARRYING = {
    "messages", "chosen", "rejected", "prompt", "completion", "context", "history", "system", "answers", "margin", "tools",
    "chat_template_kwargs", "weight", "text", "images", "answer_a", "answer_b",
}  # fmt: skip
LABELS = {"label", "labels", "kto_tag", "is_safe", "is_toxic", "is_helpful", "is_correct"}
# Names of what comes before an answer, whatever the column holds, and of what an answer depends on or begins with.
BEFORE = {"system", "context", "history", "tools"}
TASKS = {"definition", "task_definition", "task_description"}
PARTS = {
    "options",
    "choices",
    "endings",
    "reasoning",
    "reasoning_content",
    "thinking",
    "rationale",
    "chain_of_thought",
    "cot",
}
# Names of the answer to a text beside it, and of who says it.
ANSWERS = {"summary", "highlights", "headline", "code", "abstract"}
BESIDE_TEXT = {*ANSWERS, "role"}
SUPERVISED = (COMPLETION, MESSAGES, PREFERENCE, LABEL)


def check_leftover(
    form: str, left: Mapping[str, Column], meanings: Mapping[str, str], name: str, *, kept: bool, taught: bool
) -> None:
    """Refuse to leave out a column that carries meaning.

    kept: the columns are passed on to rewards. taught: the stage learns answers from prompts, where it finds them.

    Raises:
        UserError: names the columns and the flags.
    """
    carrying = [
        column
        for column, facts in left.items()
        if not facts.is_blank and _carries(column, facts, form, meanings, kept, taught)
    ]
    if not carrying:
        return
    first, flag = carrying[0], f"--ignore_columns {' '.join(map(quoted, carrying))}"
    if meanings.get("images") in carrying:
        raise UserError(
            f"{name} has the column {meanings['images']}, and only text is read; pass {flag} to train without it"
        )
    many = len(carrying) > 1
    raise UserError(
        f"{name}: nothing reads the column{'s' if many else ''} {', '.join(carrying)}; pass {flag} to train without "
        f"{'them' if many else 'it'}{_other_use(form, first, meanings)}"
    )


def _other_use(form: str, column: str, meanings: Mapping[str, str]) -> str:
    """Return what else can be done with a column than to leave it out."""
    if form == PREFERENCE and "prompt" not in meanings:
        return f", or say what it means (--columns {quoted(f'prompt={column}')})"
    if column.lower() in LABELS and form in (COMPLETION, MESSAGES, TEXT):
        return f", or keep the good rows with --row_filter {quoted(f'{column}=VALUE')}"
    if column.lower() in TASKS and "system" not in meanings:
        return f", or begin each prompt with it by --columns {quoted(f'system={column}')}"
    if form == TEXT and "text" in meanings:
        named, text = named_after(column), meanings["text"]
        if "prompt" in named:
            return f", or learn to answer it with --columns {quoted(f'completion={text}')}"
        if "completion" in named or column.lower() in ANSWERS:
            answer = quoted(f"completion={column}")
            return f", or learn to write it with --columns {quoted(f'prompt={text}')} {answer}"
    return ""


def _carries(column: str, facts: Column, form: str, meanings: Mapping[str, str], kept: bool, taught: bool) -> bool:
    named, lower = named_after(column), column.lower()
    meant = {meaning for meaning, name in meanings.items() if name == column} | possible_meanings(column, facts.kind)
    if "images" in meant:
        return True
    if kept or (form not in SUPERVISED and form != TEXT):
        return False
    if form == TEXT and not taught:
        return "text" in meant
    if form == TEXT and (named & {"prompt", "completion"} or lower in BESIDE_TEXT):
        return True
    if named & BEFORE or lower in PARTS | TASKS:
        return True
    if form == PREFERENCE and column.lower() == "labels" and facts.kind == "list":
        return False  # refused with its own message
    if meant & CARRYING or lower in LABELS:
        return True
    text = bool({"text", "messages", "mixed"} & {facts.kind, *facts.kinds})
    return form in (PREFERENCE, LABEL) and text and not is_about_rows(column)
