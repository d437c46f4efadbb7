"""What the columns of a dataset mean, by their names or as the user says."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError

# Meaning -> names of columns, the likeliest first. A column has one meaning; a meaning has one column.
NAMES: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat", "msgs"),
    "chosen": ("chosen", "preferred_output", "preferred", "chosen_response", "response_chosen", "win", "better",
        "better_response", "preferred_response", "chosen_answer", "response_j", "pos_resp", "positive_response"),
    "rejected": (
        "rejected", "non_preferred_output", "dispreferred", "rejected_response", "response_rejected", "lose", "worse",
        "worse_response", "dispreferred_response", "rejected_answer", "response_k", "neg_resp", "reject", "negative_response",
    ),
    "prompt": (
        "prompt", "instruction", "question", "query", "problem", "input", "user_input", "instructions", "history",
        "info.post", "post", "user_prompt", "inputs",
    ),
    "completion": (
        "completion", "output", "response", "answer", "answers", "target", "reply", "assistant", "solution", "responses",
        "targets", "model_output", "canonical_solution",
    ),
    "context": ("context", "input", "passage"),
    "history": ("history",),
    "system": ("system", "system_prompt", "system_message", "system_instruction"),
    "answers": ("responses", "completions", "answers", "outputs", "output", "candidates", "generations", "summaries"),
    "scores": ("scores", "ranks", "ranking", "rank", "rewards", "ratings"),
    "answer_a": ("conversation_a", "response_a", "answer_a", "output_a", "completion_a", "human_ref_A", "response_0",
        "answer_0", "output_0", "response_1", "response1", "answer_1", "output_1", "output1", "answer1"),
    "answer_b": ("conversation_b", "response_b", "answer_b", "output_b", "completion_b", "human_ref_B", "response_1",
        "answer_1", "output_1", "response_2", "response2", "answer_2", "output_2", "output2", "answer2"),
    "score_a": ("score_0", "score_1"),
    "score_b": ("score_1", "score_2"),
    "vote": ("winner", "choice", "preference", "vote", "preferred_answer", "labels", "label", "better_response_id",
        "preference_strength", "overall_preference", "safer_response_id"),
    "label": ("label", "labels", "kto_tag", "sentiment", "stars", "rating", "score", "target", "class", "toxic", "toxicity",
        "is_toxic", "is_safe", "is_helpful", "is_correct", "non_toxic", "hate", "hateful",
        "offensive", "spam", "is_hate", "is_spam"),
    "margin": ("margin",),
    "tools": ("tools", "functions"),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "weight": ("weight", "sample_weight"),
    "text": ("text", "content", "document", "raw_content", "sentence", "review", "comment_text"),
    "images": ("images", "image", "videos", "video", "audio", "audios"),
    "input_ids": ("input_ids",),
}  # fmt: skip

# Columns about a row, not of it; they may be left out without a word from the user.
ABOUT_ROWS = re.compile(
    r"(^|.*_)(id|ids|idx|index|uuid|hash|sha|md5|source|dataset|origin|split|subset|categor(y|ies)|task|type|topic|tags?|lang|"
    r"language|licen[cs]e|url|time|timestamp|date|created|worker|annotator|model|domain|confidence|version|meta|"
    r"metadata|info|extra|kind|policy|path|file|filename|name|turn|score|ratio|length|tokens|sha\d+|judge|batch|status|"
    r"subreddit|difficulty|level|author|rating)(_.*|$)",
    re.IGNORECASE,
)


def plain_name(column: str) -> str:
    """Return a column's name as names are compared: ``System Prompt`` and ``system-prompt`` are ``system_prompt``."""
    return re.sub(r"[- ]+", "_", column.strip().lower())


def is_about_rows(column: str) -> bool:
    """Return whether a column's name says that it is about a row: ``prompt_id``, ``chosen-model``."""
    return bool(ABOUT_ROWS.fullmatch(re.sub(r"[-. ]", "_", column)))


def parse_columns(values: Sequence[str] | None) -> dict[str, str]:
    """Return meaning -> column of ``["prompt=question", ...]``, or of one JSON object.

    Raises:
        UserError: another form, or an unknown meaning.
    """
    pairs: dict[str, str] = {}
    for value in values or []:
        if value.lstrip().startswith("{"):
            try:
                parsed = json.loads(value)
            except ValueError:
                parsed = None
            if not isinstance(parsed, dict):
                raise UserError(
                    f"columns {value!r} is no JSON object; write --columns prompt=question completion=answer"
                )
            pairs |= {str(ours): str(theirs) for ours, theirs in parsed.items()}
            continue
        ours, equals, theirs = value.partition("=")
        if not equals or not theirs:
            raise UserError(
                f"columns {value!r} is not of the form meaning=column; write --columns prompt=question completion=answer"
            )
        pairs[ours.strip()] = theirs.strip()
    for ours, theirs in pairs.items():
        if ours not in NAMES:
            turned = f"; did you mean {theirs}={ours}?" if theirs in NAMES else f"; choose one of {', '.join(NAMES)}"
            raise UserError(f"columns: {ours!r} is no meaning of a column{turned}")
    return pairs


def read_path(row: Mapping[str, Any], path: str) -> Any:
    """Return a column's value; ``info.post`` is the key `post` of the column `info`, ``answers.0`` the first of a list.

    None where it is absent.
    """
    if path in row or "." not in path:
        return row.get(path)
    value: Any = row
    for key in path.split("."):
        if isinstance(value, (list, tuple)) and key.isdigit():
            value = value[int(key)] if int(key) < len(value) else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def assign_meanings(
    present: Sequence[str], kinds: Mapping[str, str], requested: Mapping[str, str], ignored: Sequence[str], name: str
) -> dict[str, str]:
    """Return meaning -> column for one source; each column is listed under every meaning that its name and values allow.

    Args:
        present: the columns, and the dotted paths into columns of objects.
        kinds: what each column holds: text, messages, number, bool, integers, list, object, mixed or none.
        requested: meanings that the user gave; they leave their columns no other meaning.
        ignored: columns that are left out.
        name: the source in messages.

    Raises:
        UserError: a requested column that the source does not have.
    """
    for ours, theirs in requested.items():
        if theirs not in present:
            close = difflib.get_close_matches(theirs, present, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"columns {ours}={theirs}: {name} has no column {theirs!r} but {', '.join(present)}{hint}")
    meanings = dict(requested)
    free = [column for column in present if column not in ignored and column not in requested.values()]
    for meaning, names in NAMES.items():
        if meaning not in meanings:
            by_lower = {plain_name(column): column for column in reversed(free)}
            candidates = [by_lower[each.lower()] for each in names if each.lower() in by_lower]
            # response_1 is the first of two or the second
            taken = meanings.get(meaning.removesuffix("b") + "a") if meaning.endswith("_b") else None
            column = next((each for each in candidates if each != taken and _fits(meaning, kinds[each], each)), None)
            if column is not None:
                meanings[meaning] = column
    return meanings


# What a column of a meaning may hold. `none`: no row has a value.
ALLOWED = {
    "messages": {"messages"},
    "history": {"list", "messages", "text"},
    "answers": {"list"},
    "scores": {"list", "integers"},
    "context": {"text"},
    "system": {"text"},
    "text": {"text", "messages"},
    "tools": {"list", "text", "object"},
    "chat_template_kwargs": {"object", "text"},
    "margin": {"number", "text"},
    "score_a": {"number", "text"},
    "score_b": {"number", "text"},
    "weight": {"number", "bool", "text"},
    "label": {"number", "bool", "text"},
    "vote": {"number", "bool", "text"},
    "input_ids": {"integers"},
    "prompt": {"text", "messages", "integers"},
    "images": {"text", "list", "object", "mixed", "messages"},
}
TEXTS = {"text", "messages"}


def misfit(meaning: str, kind: str) -> str | None:
    """Say what a column of this kind is not, if it cannot have the meaning; None if it can, or is empty."""
    if kind == "none" or _fits(meaning, kind, meaning) or (meaning == "completion" and kind == "list"):
        return None
    if kind == "mixed":
        return "not of one kind in all rows"
    return "no list of messages" if meaning == "messages" else "no text"


def possible_meanings(column: str, kind: str) -> set[str]:
    """Return the meanings that a column's name and values allow."""
    return {
        meaning
        for meaning, names in NAMES.items()
        if plain_name(column) in (name.lower() for name in names) and _fits(meaning, kind, column)
    }


def _fits(meaning: str, kind: str, column: str) -> bool:
    if kind == "integers" and meaning == "prompt":
        return column.lower() == "prompt"  # other lists of numbers may be ids of any tokenizer
    return kind in ALLOWED.get(meaning, TEXTS)


def named_after(column: str) -> set[str]:
    """Return the meanings that a column's name allows, whatever it holds."""
    return {meaning for meaning, names in NAMES.items() if plain_name(column) in (name.lower() for name in names)}
