"""Messages in every common spelling, as lists of ``{"role", "content"}``."""

import ast
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.core.errors import UserError, shortened

Message = dict[str, Any]

ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance")
TRAIN_KEYS = ("train", "weight", "loss", "loss_mask", "trainable", "training")
# Keys that chat templates read, kept as they are.
TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking")
MEDIA_KEYS = ("images", "image", "audio", "audios", "video", "videos")
# Names of a question and its answer, in lists of such pairs.
EXCHANGES = (("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("human", "bot"), ("input", "output"))
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "llm": "assistant",
    "用户": "user",
    "人类": "user",
    "助手": "assistant",
    "助理": "assistant",
    "系统": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}


def parse_roles(pairs: Sequence[str] | None) -> dict[str, str]:
    """Return the name of each role in the data -> its own name, from ``["user=Customer", "assistant=Agent"]``."""
    roles = {}
    for pair in _pairs(pairs or []):
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or ours not in set(ROLES.values()):
            raise UserError(
                f"roles {pair!r} is not of the form role=name with a role of {', '.join(sorted(set(ROLES.values())))}; "
                "write --roles user=human assistant=gpt"
            )
        roles[theirs] = ours
    return roles


def _pairs(values: Sequence[str]) -> list[str]:
    """Return the values with a JSON object, as YAML mappings are handed over, written as pairs."""
    parsed = [parsed_json(value) for value in values]
    return [
        pair
        for value, each in zip(values, parsed, strict=True)
        for pair in ([f"{ours}={theirs}" for ours, theirs in each.items()] if isinstance(each, dict) else [value])
    ]


def parsed_json(value: Any) -> Any:
    """Return what a string with a JSON (or Python) list or object holds; any other value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return parsed if isinstance(parsed, (list, dict)) else value
    return value


def is_message(value: Any) -> bool:
    """Return whether a value is one message: a mapping with a role and a content, under any of their names."""
    return (
        isinstance(value, Mapping)
        and any(key in value for key in ROLE_KEYS)
        and any(key in value for key in (*CONTENT_KEYS, *TEMPLATE_KEYS))
    )


def is_exchange(value: Any) -> bool:
    """Return whether a value is one question with its answer, under the names of who says them."""
    texts = (
        {str(key).lower() for key, text in value.items() if isinstance(text, str)}
        if isinstance(value, Mapping)
        else ()
    )
    return any(set(pair) <= set(texts) for pair in EXCHANGES)


def _exchange(value: Mapping[str, Any], place: str) -> list[Message]:
    by_lower = {str(key).lower(): text for key, text in value.items()}
    question, answer = next(pair for pair in EXCHANGES if set(pair) <= set(by_lower))
    if others := {key for key, text in by_lower.items() if text is not None} - {question, answer}:
        raise UserError(f"{place} holds turns with {', '.join(sorted(others))}, which nothing reads; take them out")
    turns = [{"role": "user", "content": by_lower[question]}, {"role": "assistant", "content": by_lower[answer]}]
    return [turn for turn in turns if turn["content"] is not None]


def holds_messages(value: Any) -> bool:
    """Return whether a value is a message, or a list that begins with one; also as a JSON string."""
    value = parsed_json(value)
    if isinstance(value, Mapping) and "messages" in value:
        value = value["messages"]
    if is_message(value):
        return True
    return isinstance(value, (list, tuple)) and bool(value) and (is_message(value[0]) or is_exchange(value[0]))


def to_messages(value: Any, roles: Mapping[str, str], place: str) -> list[Message]:
    """Return a list of messages with the keys role and content, and `train` where the data say it.

    Args:
        value: a message, a list of messages, of questions with their answers, or of texts that the user and the assistant
            say in turn; also as a JSON string.
        roles: names of roles that the user gave, beside those that are known.
        place: how messages of errors begin, such as ``train.jsonl, row 3: the column messages``.

    Raises:
        UserError: an unknown role, a content that is not text, a weight other than 0 and 1.
    """
    value = parsed_json(value)
    if isinstance(value, Mapping) and "messages" in value:
        value = value["messages"]
    if is_message(value):
        value = [value]
    if isinstance(value, (list, tuple)) and value and all(is_exchange(each) for each in value):
        return [turn for each in value for turn in _exchange(each, place)]
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, str) for each in value):
        return [{"role": ("user", "assistant")[at % 2], "content": each} for at, each in enumerate(value)]
    if not isinstance(value, (list, tuple)) or not all(is_message(each) for each in value):
        raise UserError(
            f"{place} holds {shortened(value)}, which is no list of messages; give "
            "[{'role': 'user', 'content': '...'}, ...]"
        )
    return [_message(each, roles, place) for each in value]


def _message(message: Mapping[str, Any], roles: Mapping[str, str], place: str) -> Message:
    name = str(next(message[key] for key in ROLE_KEYS if key in message))
    role = roles.get(name) or ROLES.get(name.strip().lower())
    if role is None:
        raise UserError(
            f"{place} holds a message of the role {name!r}; say which role it is: --roles {quoted(f'user={name}')} or "
            f"--roles {quoted(f'assistant={name}')}"
        )
    if media := [key for key in MEDIA_KEYS if message.get(key)]:
        raise UserError(f"{place} holds a message with {media[0]}, and only text is read; drop the row, or the key")
    content = next((message[key] for key in CONTENT_KEYS if key in message), None)
    result: Message = {"role": role, "content": _content(content, place)}
    result |= {key: message[key] for key in TEMPLATE_KEYS if message.get(key) is not None}
    if result["content"] is None and not {"tool_calls", "function_call"} & set(result):
        raise UserError(f"{place} holds a message without content: {shortened(dict(message))}; drop the row")
    trained = _trained(message, place)
    if trained is not None:
        result["train"] = trained
    return result


def _content(content: Any, place: str) -> str | None:
    """Return the text of a content: a string, or its text parts joined."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        parts = [part if isinstance(part, str) else _part(part) for part in content]
        if None not in parts:
            return "".join(part for part in parts if part is not None)
    raise UserError(
        f"{place} holds a message whose content is {shortened(content)}; only text can be read, so drop rows with images "
        "or other parts"
    )


def _part(part: Any) -> str | None:
    """Return the text of a content part, or None for an image or another part."""
    kind = part.get("type") if isinstance(part, Mapping) else "?"
    text = part.get("text") if kind in ("text", "input_text", "output_text") else None
    return text if isinstance(text, str) else None


def _trained(message: Mapping[str, Any], place: str) -> bool | None:
    """Return whether a message is trained on, by a key of `TRAIN_KEYS`; None without one."""
    for key in TRAIN_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1, True, False):
            raise UserError(f"{place} holds a message with {key} {value!r}; give 0 (no loss) or 1")
        return bool(value)
    return None


def shared_prefix(first: Sequence[Message], second: Sequence[Message]) -> list[Message]:
    """Return the messages that two conversations begin with alike, without their last assistant turn."""
    count = 0
    for one, other in zip(first[:-1], second[:-1], strict=False):
        if (one["role"], one["content"]) != (other["role"], other["content"]):
            break
        count += 1
    while count and first[count - 1]["role"] == "assistant":
        count -= 1
    return list(first[:count])


def quoted(name: str) -> str:
    """Return a name or a pair as it is typed in a shell."""
    return shlex.quote(name) if re.search(r"[^\w@%+=:,./-]", name) else name
