"""The shapes of rows that people bring, and how the shape of a source is found.

A format says which meanings it needs and may use, and which form its rows are turned into (see `convert`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.forms.messages import quoted

# What a row is turned into.
TEXT, MESSAGES, COMPLETION, PREFERENCE, LABEL, PROMPT = (
    "text", "messages", "prompt_completion", "preference", "label", "prompt",
)  # fmt: skip

BEFORE_ANSWER = ("system", "context", "history", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    needs: meanings without which it is not this shape. uses: further meanings. form: what its rows are turned into.
    """

    name: str
    needs: tuple[str, ...]
    uses: tuple[str, ...]
    form: str


FORMATS = (
    Format("ranked", ("prompt", "answers"), ("scores", *BEFORE_ANSWER), PREFERENCE),
    Format("votes", ("answer_a", "answer_b", "vote"), ("prompt", *BEFORE_ANSWER), PREFERENCE),
    Format("scored_pair", ("answer_a", "answer_b", "score_a", "score_b"), ("prompt", *BEFORE_ANSWER), PREFERENCE),
    Format("pair_votes", ("prompt", "answers", "vote"), BEFORE_ANSWER, PREFERENCE),
    Format("preference", ("chosen", "rejected"), ("prompt", "messages", "margin", *BEFORE_ANSWER), PREFERENCE),
    Format("kto", ("prompt", "completion", "label"), BEFORE_ANSWER, LABEL),
    Format("labelled_messages", ("messages", "label"), ("system", "tools", "chat_template_kwargs"), LABEL),
    Format("classification", ("text", "label"), (), LABEL),
    Format("chosen_answer", ("chosen",), ("prompt", *BEFORE_ANSWER), COMPLETION),
    Format("prompt_completion", ("prompt", "completion"), BEFORE_ANSWER, COMPLETION),
    Format("messages", ("messages",), ("system", "tools", "chat_template_kwargs"), MESSAGES),
    Format("text", ("text",), (), TEXT),
    Format("token_ids", ("input_ids",), (), PROMPT),
    Format("prompt", ("prompt",), BEFORE_ANSWER, PROMPT),
)
BY_NAME = {each.name: each for each in FORMATS}

# Names of data sets and of peers' formats -> format. What is particular to one is found in its values.
REQUESTED = {
    "text": ("text",),
    "openai": ("preference", "messages"),
    "sharegpt": ("preference", "labelled_messages", "messages"),
    "alpaca": ("ranked", "preference", "kto", "prompt_completion"),
    "dolly": ("prompt_completion",),
    "prompt_completion": ("prompt_completion",),
    "preference": ("preference",),
    "hh": ("preference", "chosen_answer"),
    "ultrafeedback": ("preference", "ranked", "messages", "chosen_answer"),
    "orca": ("preference", "prompt_completion"),
    "kto": ("kto", "labelled_messages"),
    "ranked": ("ranked",),
    "votes": ("votes", "pair_votes", "scored_pair"),
    "classification": ("classification", "labelled_messages"),
    "prompt": ("prompt",),
}

# Stages' forms, the preferred one first -> the forms of rows that serve, and what else may be made of them.
SERVES = {
    TEXT: {TEXT},
    MESSAGES: {MESSAGES},
    COMPLETION: {COMPLETION},
    PREFERENCE: {PREFERENCE},
    LABEL: {LABEL},
    PROMPT: {PROMPT, COMPLETION, PREFERENCE, MESSAGES, LABEL},
}


def check_format(name: str) -> None:
    """Raise UserError if `name` is no format."""
    if name != "auto" and name not in REQUESTED:
        raise UserError(f"unknown dataset_format {name!r}; choose one of auto, {', '.join(REQUESTED)}")


def choose_format(
    meanings: Mapping[str, str],
    forms: Sequence[str],
    requested: str,
    name: str,
    present: Sequence[str],
    *,
    first: bool = False,
    text_prompts: bool = False,
    hints: Sequence[str] = (),
) -> Format:
    """Return the shape of a source for a stage that reads `forms`, the preferred one first.

    Args:
        meanings: meaning -> column, as `assign_meanings` returns it.
        requested: a key of `REQUESTED`, or auto.
        name: the source in messages. present: its columns.
        first: of two shapes that fit, take the first. text_prompts: a text serves as a prompt.
        hints: what is said of columns that could not be read, if no shape fits.

    Raises:
        UserError: no shape fits, or two do and `first` is False.
    """
    known = FORMATS if requested == "auto" else [BY_NAME[each] for each in REQUESTED[requested]]
    complete = [each for each in known if _has(each, meanings)]
    if "rejected" in meanings:  # only a user who leaves the rejected answers out learns from the chosen ones alone
        complete = [each for each in complete if each.name != "chosen_answer"]
    fitting = [each for form in forms for each in complete if _serves(each, form, text_prompts)]
    fitting = [each for each in fitting if not any(_says_more(other, each, meanings) for other in fitting)]
    if not fitting:
        raise UserError(_no_format(known, complete, forms, requested, name, present, meanings, hints))
    best = fitting[0]
    columns = set(_taken(best, meanings).values())
    others = [each for each in fitting[1:] if not set(_needed(each, meanings)) <= columns]
    if _plainly_named(best, meanings):
        others = [each for each in others if not _plainly_named(each, meanings)]
    if requested == "auto" and others and not first:
        one, other = (", ".join(_needed(each, meanings)) for each in (best, others[0]))
        raise UserError(
            f"{name} can be read in two ways: by {one}, or by {other}; leave one of them out, for example "
            f"--ignore_columns {' '.join(quoted(column) for column in _needed(others[0], meanings) if column not in columns)}"
        )
    return best


def _serves(each: Format, form: str, text_prompts: bool) -> bool:
    """Return whether rows of a shape serve a stage that reads `form`."""
    if form == PROMPT and each.needs[0] == "text":
        return text_prompts
    return each.form in SERVES[form]


def columns_of_other_stages(each: Format, meanings: Mapping[str, str]) -> set[str]:
    """Return the columns that other shapes in the same rows need, if all columns have the names of their meanings.

    Such rows serve several stages: ``prompt, completion, chosen, rejected, text``. A shape that adds to this one, such as
    a label to prompt and completion, is not among them.
    """
    own = set(_needed(each, meanings))
    others = [other for other in FORMATS if other.form != PROMPT and _has(other, meanings)]
    others = [other for other in others if _plainly_named(other, meanings)]
    if not _plainly_named(each, meanings):
        return set()
    return {name for other in others for name in _needed(other, meanings) if not set(_needed(other, meanings)) > own}


def _plainly_named(each: Format, meanings: Mapping[str, str]) -> bool:
    return all(meanings[meaning] == meaning for meaning in each.needs)


def columns_of(each: Format, meanings: Mapping[str, str]) -> dict[str, str]:
    """Return meaning -> column of what the format reads; no column is read twice."""
    return _taken(each, meanings)


def _taken(each: Format, meanings: Mapping[str, str]) -> dict[str, str]:
    taken: dict[str, str] = {}
    for meaning in (*each.needs, *each.uses):
        if meaning in meanings and meanings[meaning] not in taken.values():
            taken[meaning] = meanings[meaning]
    return taken


def _says_more(other: Format, each: Format, meanings: Mapping[str, str]) -> bool:
    """Return whether another shape of the same form needs all columns that this one needs, and further ones."""
    return other.form == each.form and set(_needed(other, meanings)) > set(_needed(each, meanings))


def _needed(each: Format, meanings: Mapping[str, str]) -> list[str]:
    return [meanings[meaning] for meaning in each.needs]


def _has(each: Format, meanings: Mapping[str, str]) -> bool:
    """Return whether the source has all that a format needs, in different columns."""
    columns = [meanings.get(meaning) for meaning in each.needs]
    return None not in columns and len(set(columns)) == len(columns)


WHAT = {
    TEXT: "text (a column `text`)",
    MESSAGES: "conversations (a column `messages`)",
    COMPLETION: "prompts and answers (`prompt` and `completion`)",
    PREFERENCE: "preferences (`chosen` and `rejected`)",
    LABEL: "labelled texts (`text` and `label`)",
    PROMPT: "prompts (a column `prompt`)",
}
EXAMPLE = {
    TEXT: "--columns text=NAME",
    MESSAGES: "--columns messages=NAME",
    COMPLETION: "--columns prompt=NAME completion=NAME",
    PREFERENCE: "--columns prompt=NAME chosen=NAME rejected=NAME",
    LABEL: "--columns text=NAME label=NAME",
    PROMPT: "--columns prompt=NAME",
}


def _no_format(
    known: Sequence[Format], complete: Sequence[Format], forms: Sequence[str], requested: str, name: str,
    present: Sequence[str], meanings: Mapping[str, str], hints: Sequence[str],
) -> str:  # fmt: skip
    columns = ", ".join(present) or "no columns"
    if requested != "auto" and not complete:
        needs = " or ".join("+".join(each.needs) for each in known)
        return (
            f"{name} is not of the format {requested}, which needs {needs}; its columns are {columns}: say what they mean "
            f"({EXAMPLE[known[0].form]}) or give another --dataset_format"
        )
    wanted = " or ".join(WHAT[form] for form in forms)
    if complete:
        found = complete[0]
        return (
            f"{name} holds {WHAT[found.form]}, in the columns {columns}, and this stage reads {wanted}"
            f"; {'; '.join(hints) or _hint(found.form, forms, meanings)}"
        )
    rest = "; ".join(hints) or f"say what they mean: {_example(forms, meanings)}"
    return f"{name} has the columns {columns}, and this stage reads {wanted}; {rest}"


def _hint(form: str, forms: Sequence[str], meanings: Mapping[str, str]) -> str:
    """Return what to do with rows of one form in a stage that reads others."""
    if form == PREFERENCE and COMPLETION in forms and "rejected" in meanings:
        return f"to learn the chosen answers pass --ignore_columns {quoted(meanings['rejected'])}"
    if form in (TEXT, LABEL) and PROMPT in forms and "text" in meanings:
        return (
            "pass --prompt_tokens N to use the first tokens of each text as a prompt, or --columns "
            f"{quoted('prompt=' + meanings['text'])}"
        )
    if form == LABEL and PREFERENCE in forms:
        return "the reward stage learns from labelled answers (--reward_type classifier)"
    if form == LABEL and COMPLETION in forms:
        label = quoted(meanings["label"])
        return f"keep the good rows (--row_filter {label}=true) or pass --ignore_columns {label}"
    return f"give another dataset, or say what the columns mean: {_example(forms, meanings)}"


def _example(forms: Sequence[str], meanings: Mapping[str, str]) -> str:
    """Return the flag for the meanings that are missing; of labels where there is one."""
    labelled = LABEL in forms and {"label", "text"} & set(meanings) and "chosen" not in meanings
    form = LABEL if labelled else forms[0]
    pairs = EXAMPLE[form].removeprefix("--columns ").split()
    missing = [pair for pair in pairs if pair.partition("=")[0] not in meanings]
    return f"--columns {' '.join(missing or pairs)}"
