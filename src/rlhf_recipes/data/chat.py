"""Chat templates: from a conversation to text, and how a template ends a turn.

Our template ends every assistant turn with the EOS token, so a model that is trained on it learns to stop. Its
generation markers tell which tokens carry loss.
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_recipes.core.errors import UserError, shortened
from rlhf_recipes.data.special_tokens import bos_prefix, special_token_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
# For a vocabulary without role tokens, such as the released GPT-2's.
ROLE_WORDS = {"system": "System: ", "user": "User: ", "assistant": "Assistant:"}
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
PROBE = "Zqxj"  # an answer that no template writes itself


def chat_template(roles: Mapping[str, str] = ROLE_TOKENS, separator: str = "", start: str = "") -> str:
    """Return a Jinja chat template.

    Args:
        roles: the text before a turn, by role.
        separator: the text after a system or user turn; an assistant turn ends with EOS.
        start: the text before the first turn, such as the BOS token.
    """
    quoted = {role: repr(text) for role, text in roles.items()}
    return (
        (f"{{{{ {start!r} }}}}" if start else "") + "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        f"{{{{ {quoted['assistant']} }}}}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% elif message['role'] == 'system' %}"
        f"{{{{ {quoted['system']} + message['content'] + {separator!r} }}}}"
        "{% elif message['role'] == 'user' %}"
        f"{{{{ {quoted['user']} + message['content'] + {separator!r} }}}}"
        "{% else %}"
        "{{ raise_exception('the chat template knows the roles system, user and assistant, not ' + message['role']) }}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {quoted['assistant']} }}}}{{% endif %}}"
    )


def ensure_chat_template_(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set our chat template on a tokenizer without one: with role tokens if its vocabulary has them, else words.

    Conversations then begin as plain texts of this tokenizer do, for instance with its BOS.
    """
    if getattr(tokenizer, "chat_template", None):
        return
    start = "".join(tokenizer.convert_ids_to_tokens(bos_prefix(tokenizer)))
    vocabulary = set(tokenizer.get_vocab())
    if set(ROLE_TOKENS.values()) <= vocabulary:
        tokenizer.chat_template = chat_template(start=start)
    else:
        tokenizer.chat_template = chat_template(ROLE_WORDS, separator="\n", start=start)


def is_conversation(value: Any) -> bool:
    """Whether a column's value is a list of messages rather than text or ids."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def plain_text(value: Any) -> str:
    """Return the text of a prompt or completion; of a list of messages their contents, joined."""
    if is_conversation(value):
        return "".join(message["content"] for message in value if isinstance(message.get("content"), str))
    return str(value)


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments `tools` and `chat_template_kwargs` of a row's columns, each a Python value or JSON text.

    Raises:
        UserError: a text that is no JSON.
    """
    values = {name: row.get(name) for name in TEMPLATE_COLUMNS}
    try:
        parsed = {name: json.loads(value) if isinstance(value, str) else value for name, value in values.items()}
    except ValueError:
        raise UserError(
            f"the columns {' and '.join(TEMPLATE_COLUMNS)} go to the chat template, but {shortened(values)} is no JSON; "
            "rename or repair them"
        ) from None
    return {name: value for name, value in parsed.items() if value}


def column_template_options(columns: Mapping[str, Sequence[Any]], rows: int) -> list[dict[str, Any]]:
    """Return `template_options` of each row, from columns given as lists of `rows` values."""
    named = {name: columns[name] for name in TEMPLATE_COLUMNS if name in columns}
    return [template_options({name: values[row] for name, values in named.items()}) for row in range(rows)]


def join_turns(prompt: Sequence[Mapping[str, Any]], completion: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a prompt and its completion. An assistant turn that the prompt begins is continued."""
    before, after = ([dict(message) for message in part] for part in (prompt, completion))
    if before and after and before[-1]["role"] == after[0]["role"] == "assistant":
        begun = before.pop()
        after[0] = begun | after[0] | {"content": (begun.get("content") or "") + (after[0].get("content") or "")}
    return before + after


def render_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tools: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> str:
    """Render messages by the tokenizer's chat template; a tokenizer without one gets ours.

    Args:
        tools: JSON schemas of functions that the model may call.
        chat_template_kwargs: variables of the template.
        options: further arguments of `apply_chat_template`, such as add_generation_prompt.

    Raises:
        UserError: the template refuses the messages.
    """
    from jinja2 import TemplateError

    ensure_chat_template_(tokenizer)
    variables = {name: value for name, value in (chat_template_kwargs or {}).items() if value is not None}
    try:
        return str(
            tokenizer.apply_chat_template(
                [clean_message(message) for message in messages], tools=tools or None, tokenize=False,
                **options, **variables,
            )
        )  # fmt: skip
    except (TemplateError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the chat template cannot render the messages {shortened(messages)}: {reason}") from None


def clean_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as a template expects it: without our key `train` and without keys that have no value."""
    return {key: value for key, value in message.items() if key != "train" and value is not None}


def prompt_text(prompt: Any, tokenizer: "PreTrainedTokenizerBase", **template: Any) -> str:
    """Return the text that a model continues: messages rendered by the chat template, or the prompt itself.

    An assistant turn at the end of the messages is left open, so that it is continued.

    template: `tools` and `chat_template_kwargs`, see `render_messages`.
    """
    if not is_conversation(prompt):
        return str(prompt)
    how = "continue_final_message" if prompt[-1]["role"] == "assistant" else "add_generation_prompt"
    return render_messages(prompt, tokenizer, **{**template, how: True})


class TurnEnd(NamedTuple):
    """How a chat template ends the last assistant turn.

    token: the special token behind the answer, its text. id: its id. rest: what the template writes after it.
    """

    token: str
    id: int
    rest: str


_turn_ends: "weakref.WeakKeyDictionary[Any, tuple[Any, TurnEnd | None]]" = weakref.WeakKeyDictionary()


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> TurnEnd | None:
    """Return how the chat template ends an assistant turn, or None without a template or without such a token.

    The token is the first special token behind the answer: EOS in our template, ``<|im_end|>`` in ChatML (followed by a
    line break), ``<|end|>`` in that of Phi-3 (followed by a line break and EOS). A policy samples this token last.
    """
    key = (str(getattr(tokenizer, "chat_template", None)), tokenizer.eos_token)
    remembered = _turn_ends.get(tokenizer)
    if remembered is None or remembered[0] != key:
        remembered = (key, _find_turn_end(tokenizer))
        _turn_ends[tokenizer] = remembered
    return remembered[1]


def _find_turn_end(tokenizer: "PreTrainedTokenizerBase") -> TurnEnd | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    for messages in (answered, [{"role": "system", "content": "b"}, *answered]):
        try:
            text = render_messages(messages, tokenizer)
        except UserError:
            continue
        _, found, tail = text.rpartition(PROBE)
        specials = special_token_texts(tokenizer)
        places = [(tail.find(token), -len(token), token) for token in specials if token and token in tail]
        if found and places:
            place, _, token = min(places)
            return TurnEnd(token, specials[token], tail[place + len(token) :])
    return None


def without_tail(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a rendered conversation up to its last turn end: without the line break that ChatML writes after it."""
    end = turn_end(tokenizer)
    if end is None or not end.rest or not text.endswith(end.token + end.rest):
        return text
    return text[: -len(end.rest)]


def require_turn_end(tokenizer: "PreTrainedTokenizerBase", name: str) -> TurnEnd:
    """Return how the chat template ends an answer.

    name: what the message calls the model.

    Raises:
        UserError: with no special token, so that a model could not learn to stop.
    """
    ensure_chat_template_(tokenizer)
    end = turn_end(tokenizer)
    if end is None:
        raise UserError(
            f"the chat template of {name} writes no special token after an assistant turn, so no answer would end; let "
            "the template write {{ eos_token }} there"
        )
    return end
