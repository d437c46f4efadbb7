"""Columns that are named after a meaning and hold something else: what to pass so that they are read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf_recipes.core.errors import UserError, shortened
from rlhf_recipes.data.forms.meanings import misfit, named_after
from rlhf_recipes.data.forms.messages import quoted
from rlhf_recipes.data.forms.survey import Column

PLAINLY_NAMED = ("text", "messages", "prompt", "completion", "chosen", "rejected")
# Meanings of text; numbers in a column that the user gave one of them are read as they are written.
SAID = frozenset({"prompt", "completion", "chosen", "rejected", "text", "context", "system", "answer_a", "answer_b"})
HINTED = ("messages", "chosen", "rejected", "prompt", "completion", "text", "label")
INNER_KEYS = ("full_text", "text", "content", "value", "post", "body", "answer", "response")


def as_requested(facts: Mapping[str, Column], requested: Mapping[str, str]) -> dict[str, Column]:
    """Return the facts with the columns that the user gave a meaning as that: numbers as text, lists of texts as turns."""
    changed = dict(facts)
    for meaning, column in requested.items():
        found = facts.get(column, Column())
        if meaning in SAID and {"number"} <= set(found.kinds) <= {"number", "text"}:
            changed[column] = replace(found, kinds=Counter(text=found.kinds.total()))
        if meaning == "messages" and found.kind == "list" and _all_texts(found.sample):
            changed[column] = replace(found, kinds=Counter(messages=found.kinds.total()))
    return changed


def refuse_misfits(facts: Mapping[str, Column], requested: Mapping[str, str], name: str) -> None:
    """Refuse columns that are named after a meaning and hold something else.

    Raises:
        UserError: names the column, its first value and the flag.
    """
    named = {meaning: meaning for meaning in PLAINLY_NAMED if meaning in facts and meaning not in requested.values()}
    for meaning, column in (named | dict(requested)).items():
        if column in facts and (problem := misfit(meaning, facts[column].kind)):
            if not (flag := _flag(meaning, column, facts[column])):
                flag = "change it"
            raise UserError(
                f"{name}: the column {column} holds {shortened(facts[column].sample)}, which is {problem}; {flag}, or leave "
                f"it out with --ignore_columns {quoted(column)}"
            )


def misfit_hints(facts: Mapping[str, Column], meanings: Mapping[str, str]) -> list[str]:
    """Return, for each missing meaning, the column that is named after it, what it holds, and the flag that reads it."""
    hints = []
    for meaning in HINTED:
        for column, found in facts.items():
            fits = meaning in meanings or found.is_blank or meaning not in named_after(column)
            flag = None if fits else _flag(meaning, column, found)
            if flag:
                hints.append(f"the column {column} holds {shortened(found.sample, 40)}: {flag}")
                break
    return hints


def _flag(meaning: str, column: str, found: Column) -> str | None:
    """Return what to pass so that a column is read, if it can be."""
    kinds, sample = set(found.kinds), found.sample
    if meaning in SAID and {"number"} <= kinds <= {"number", "text"}:
        return f"pass --columns {quoted(f'{meaning}={column}')} to read numbers as text"
    if isinstance(sample, Mapping) and meaning in SAID and (path := _text_path(sample)):
        return f"pass --columns {quoted(f'{meaning}={column}.{path}')} to read that part of it"
    if kinds == {"list"} and _all_texts(sample):
        if meaning == "messages":
            return (
                f"pass --columns {quoted(f'messages={column}')} if its texts are of the user and the assistant in turn"
            )
        if meaning in SAID:
            return f"pass --columns {quoted(f'{meaning}={column}.0')} to read the first of its texts"
    return None


def _text_path(value: Mapping[str, Any]) -> str | None:
    """Return the path to the text in an object: of a known name, or the first."""
    for key in sorted(value, key=lambda each: INNER_KEYS.index(each) if each in INNER_KEYS else len(INNER_KEYS)):
        if isinstance(value[key], str):
            return str(key)
        if _all_texts(value[key]):
            return f"{key}.0"
    return None


def _all_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, str) for each in value)
