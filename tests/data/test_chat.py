"""The chat template, prompts and completions as token ids, and checks of their rows."""

from collections.abc import Callable
from typing import Any

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import (
    chat_template,
    ensure_chat_template_,
    is_conversation,
    plain_text,
)
from rlhf_recipes.data.checks import require_texts
from rlhf_recipes.data.encoding import encode_completion, prompt_ids


def test_chat_template_ends_answers_with_eos_and_masks_them(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template()
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = "Hello!<|endoftext|>"
    assert text == f"<|system|>Be kind.<|user|>Hi<|assistant|>{answer}<|user|>Bye<|assistant|>"
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answer_tokens = [token for token, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mask]
    assert answer_tokens == [*b"Hello!", EOS]
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_chat_template_uses_plain_words_without_role_tokens(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    ensure_chat_template_(tokenizer)
    assert tokenizer.chat_template == chat_template()
    plain = make_tokenizer()
    plain.chat_template = None
    vocabulary = {token: index for token, index in plain.get_vocab().items() if token != "<|user|>"}
    plain.get_vocab = lambda: vocabulary
    ensure_chat_template_(plain)
    text = plain.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "User: Hi\nAssistant:"


def test_prompt_ids_are_equal_for_text_messages_and_ids(make_tokenizer: Callable[[], Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template()
    messages = [{"role": "user", "content": "Hi"}]
    ids = prompt_ids(messages, tokenizer)
    assert ids == [258, *b"Hi", 259]
    assert ids == prompt_ids("<|user|>Hi<|assistant|>", tokenizer) == prompt_ids(ids, tokenizer)
    assert is_conversation(messages) and not is_conversation("Hi") and not is_conversation([1, 2])
    assert plain_text(messages) == plain_text("Hi") == "Hi"
    with pytest.raises(UserError, match="empty prompt"):
        prompt_ids("", tokenizer)


BOS, EOS = 260, 256


def test_plain_text_gets_the_tokenizers_bos(make_tokenizer_with_bos: Callable[[], Any], tokenizer: Any) -> None:
    """The BOS of messages is the chat template's decision."""
    with_bos = make_tokenizer_with_bos()
    assert with_bos("Hi")["input_ids"] == [BOS, *b"Hi"]
    assert prompt_ids("Hi", with_bos) == [BOS, *b"Hi"] and prompt_ids("Hi", tokenizer) == [*b"Hi"]
    assert prompt_ids([{"role": "user", "content": "Hi"}], with_bos) == [258, *b"Hi", 261, 259]
    assert encode_completion("Hi", " you", with_bos) == ([BOS, *b"Hi"], [*b" you", EOS])
    assert encode_completion("", "you", with_bos) == ([], [BOS, *b"you", EOS])
    with pytest.raises(UserError, match="empty prompt"):
        prompt_ids("", with_bos)


ALTERNATING_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, and a user begins') }}{% endif %}{{ message['content'] }}{% endfor %}"
)


def test_a_completion_is_rendered_after_its_prompt(make_tokenizer: Callable[[], Any]) -> None:
    """A chat template may check the roles of earlier messages, so a completion is rendered as in training."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ALTERNATING_TEMPLATE
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]}
    require_texts([row, row], ["prompt", "completion"], tokenizer)
    with pytest.raises(
        UserError, match="row 1: the column completion cannot be rendered by the chat template: roles must"
    ):
        require_texts([row, row | {"completion": row["prompt"]}], ["prompt", "completion"], tokenizer)
    with pytest.raises(UserError, match="row 0: the column prompt cannot be rendered"):
        require_texts([row | {"prompt": row["completion"]}], ["prompt", "completion"], tokenizer)
    with pytest.raises(UserError, match="row 0: the column completion cannot be rendered"):
        require_texts([row], ["completion"], tokenizer)
