"""Conversations as token ids with a loss mask: which tokens an assistant says, turn by turn.

The generation markers of a chat template say it. For a template without them it is found by rendering the conversation
turn by turn, and for the templates that TRL knows by TRL's marked version.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import (
    clean_message,
    ensure_chat_template_,
    is_conversation,
    join_turns,
    prompt_text,
    render_messages,
    template_options,
    turn_end,
    without_tail,
)
from rlhf_recipes.data.encoding import encode_completion, encode_text, plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100  # the label of a token without loss
Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # first token, and the one after the last


def encode_conversation(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase", *, assistant_only: bool = True, **template: Any
) -> tuple[list[int], list[bool]]:
    """Tokenize a conversation; returns (ids, whether each id has loss).

    An assistant turn has loss on what it says and on the token that ends it. A message with ``train: False`` has none.

    Args:
        assistant_only: False gives loss to every token, except those of messages with ``train: False``.
        template: `tools` and `chat_template_kwargs`, see `render_messages`.

    Raises:
        UserError: the chat template refuses the messages, or does not show which tokens an assistant says.
    """
    ensure_chat_template_(tokenizer)
    untrained = [index for index, message in enumerate(messages) if message.get("train") is False]
    if not assistant_only and not untrained:
        ids = plain_ids(without_tail(render_messages(messages, tokenizer, **template), tokenizer), tokenizer)
        return ids, [True] * len(ids)
    ids, spans = _assistant_spans(messages, tokenizer, template)
    mask = [not assistant_only] * len(ids)
    for index, (start, end) in spans.items():
        mask[start:end] = [index not in untrained] * (end - start)
    for index in untrained:
        if index not in spans and not assistant_only:
            start, end = _rendered_span(messages, index, ids, tokenizer, template) or (0, 0)
            if start == end:
                raise _unmarked(tokenizer)
            mask[start:end] = [False] * (end - start)
    return ids, mask


def encode_demonstration(
    row: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text_column: str = "text",
    assistant_only: bool = True,
    completion_only: bool = True,
) -> dict[str, list[int]]:
    """Tokenize a row of demonstrations to `input_ids` and `labels`, where the label -100 means no loss.

    Args:
        row: messages; or prompt and completion; or a text. Optionally tools and chat_template_kwargs.
        assistant_only: of conversations, only what the assistant says has loss.
        completion_only: of prompt and completion, only the completion has loss.
    """
    template = template_options(row)
    if row.get("messages") is not None:
        ids, mask = encode_conversation(row["messages"], tokenizer, assistant_only=assistant_only, **template)
    elif row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        before, after = encode_completion(prompt, completion, tokenizer, **template)
        ids, mask = [*before, *after], [not completion_only] * len(before) + [True] * len(after)
        if is_conversation(completion) and (assistant_only or _has_untrained(prompt, completion)):
            turns = join_turns(prompt or [], completion)
            _, said = encode_conversation(turns, tokenizer, assistant_only=assistant_only, **template)
            mask = [one and other for one, other in zip(mask, said, strict=True)]
    else:
        ids = encode_text(row[text_column], tokenizer)
        mask = [True] * len(ids)
    return {"input_ids": ids, "labels": [token if kept else NO_LOSS for token, kept in zip(ids, mask, strict=True)]}


def require_assistant_spans(tokenizer: "PreTrainedTokenizerBase", messages: Messages, name: str) -> None:
    """Check that the chat template shows what the assistant says in these messages, before a whole dataset is tokenized.

    Raises:
        UserError: it does not; names the model.
    """
    try:
        encode_conversation(messages, tokenizer)
    except _UnmarkedTemplate as error:
        raise UserError(str(error).replace("the chat template", f"the chat template of {name}", 1)) from None


class _UnmarkedTemplate(UserError):
    """The chat template does not show which tokens an assistant says."""


def _unmarked(tokenizer: "PreTrainedTokenizerBase") -> _UnmarkedTemplate:
    return _UnmarkedTemplate(
        "the chat template does not mark what the assistant says with {% generation %}, so loss cannot be limited to it; "
        "add the markers to the template, or pass --assistant_only_loss false"
    )


def _has_untrained(*parts: Any) -> bool:
    return any(message.get("train") is False for part in parts if is_conversation(part) for message in part)


def _assistant_spans(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase", template: Mapping[str, Any]
) -> tuple[list[int], dict[int, Span]]:
    """Return the ids of a conversation, and the span of each assistant turn by the index of its message."""
    text = render_messages(messages, tokenizer, **template)
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    marked = _marked_template(tokenizer)
    if marked is not None and tokenizer.is_fast:
        rendered, characters = _generation_spans(messages, tokenizer, marked, template)
        if rendered == text and len(characters) == len(said):
            return _token_spans(text, dict(zip(said, characters, strict=True)), tokenizer)
    ids = plain_ids(without_tail(text, tokenizer), tokenizer)
    spans = {index: _rendered_span(messages, index, ids, tokenizer, template) for index in said}
    found = {index: span for index, span in spans.items() if span is not None}
    if len(found) == len(said):
        return ids, found
    if marked is not None and tokenizer.is_fast and len(characters) == len(said):
        return _token_spans(rendered, dict(zip(said, characters, strict=True)), tokenizer)
    raise _unmarked(tokenizer)


def _marked_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the tokenizer's chat template if it has generation markers, else TRL's marked version of it, else None."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return None
    if has_generation_markers(template):
        return str(template)
    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # an unknown template, or one that cannot render what TRL tries it with
        return None


def _generation_spans(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase", marked: str, template: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    """Render a marked template; returns the text and the spans of characters that its markers enclose."""
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = dict(template.get("chat_template_kwargs") or {})
    texts, spans = render_jinja_template(
        [[clean_message(message) for message in messages]],
        tools=template.get("tools") or None,
        chat_template=variables.pop("chat_template", marked),
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **variables},
    )
    return str(texts[0]), [(int(start), int(end)) for start, end in spans[0]]


def _token_spans(
    text: str, characters: Mapping[int, Span], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], dict[int, Span]]:
    """Return the ids of a rendered conversation, and the spans of tokens that cover the spans of characters.

    A span ends with the token that ends the turn: a line break that the markers enclose behind it is left out, and a turn
    end that they leave out is included.
    """
    encoded = tokenizer(
        without_tail(text, tokenizer), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    end_token = turn_end(tokenizer)
    spans: dict[int, Span] = {}
    for index, (first, last) in characters.items():
        covered = [place for place, (start, end) in enumerate(offsets) if start < last and end > first]
        if not covered:
            spans[index] = (0, 0)
            continue
        start, end = covered[0], covered[-1] + 1
        if end_token is not None:
            ends = [place for place in range(start, end) if ids[place] == end_token.id]
            if ends:
                end = ends[-1] + 1
            elif ids[end : end + 1] == [end_token.id]:
                end += 1
        spans[index] = (start, end)
    return ids, spans


def _rendered_span(
    messages: Messages,
    index: int,
    ids: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    template: Mapping[str, Any],
) -> Span | None:
    """Return the tokens that a message adds to those before it, or None if earlier tokens change with later messages."""
    try:
        until = render_messages(messages[: index + 1], tokenizer, **template)
        if messages[index]["role"] != "assistant":
            before = without_tail(render_messages(messages[:index], tokenizer, **template), tokenizer) if index else ""
        elif index and messages[index - 1]["role"] != "assistant":
            before = prompt_text(messages[:index], tokenizer, **template)
        else:
            return None
    except UserError:
        return None  # a template may refuse a part of a conversation
    head = plain_ids(before, tokenizer) if before else []
    whole = plain_ids(without_tail(until, tokenizer), tokenizer)
    if list(ids[: len(whole)]) != whole or whole[: len(head)] != head or len(head) >= len(whole):
        return None
    return len(head), len(whole)
