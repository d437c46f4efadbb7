"""Conversations written as one string, such as ``Human: ... Assistant: ...`` of hh-rlhf (Bai et al. 2022)."""

import re

from rlhf_recipes.core.errors import UserError, shortened
from rlhf_recipes.data.forms.messages import Message

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
# At the beginning of a line; after ### also within one, as openassistant-guanaco writes.
_NAMED = re.compile(
    r"(?:(?:^|\n)\s*(?:###? ?)?|\s*### ?)(Human|User|System|Assistant|AI|Bot|HUMAN|USER|SYSTEM|ASSISTANT): ?"
)
_ROLE = {
    "Human": "user",
    "User": "user",
    "System": "system",
    "Assistant": "assistant",
    "AI": "assistant",
    "Bot": "assistant",
}


def is_transcript(value: object) -> bool:
    """Return whether a text is a conversation of hh-rlhf: it begins with ``Human:`` and has an ``Assistant:``."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def transcript_messages(text: str) -> list[Message]:
    """Return the turns of a conversation of hh-rlhf. An ``Assistant:`` without text at the end is left out."""
    pieces = _TURN.split("\n\n" + text.lstrip())[1:]
    turns: list[Message] = [
        {"role": _ROLE[name], "content": content.rstrip()}
        for name, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def split_transcript(text: str) -> tuple[str, str]:
    """Return what comes before the last answer of a conversation, with its ``Assistant:``, and the answer."""
    mark = "\n\nAssistant:"
    end = text.rindex(mark) + len(mark)
    return text[:end], text[end:]


def dialogue_messages(text: str, place: str) -> list[Message]:
    """Return the turns of a text whose turns begin with a name on a new line, such as ``User:`` and ``Assistant:``.

    Raises:
        UserError: the text does not begin with such a name, or the assistant says nothing; the message begins with `place`.
    """
    before, *pieces = _NAMED.split(text)
    turns: list[Message] = [
        {"role": _ROLE[name if name == "AI" else name.capitalize()], "content": content.strip()}
        for name, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if before.strip() or not any(turn["role"] == "assistant" and turn["content"] for turn in turns):
        raise UserError(
            f"{place} holds {shortened(text)}, in which no turns are found; begin each turn on a new line with User: or "
            "Assistant:, or leave --as_chat out"
        )
    return turns
