"""Chat templates and tokenization: from a prompt or a conversation to text and token ids, in one place.

Our template ends every assistant turn with the EOS token, so a model that is trained on it learns to stop. Its
generation markers tell TRL which tokens carry loss.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
# For a vocabulary without role tokens, such as the released GPT-2's.
ROLE_WORDS = {"system": "System: ", "user": "User: ", "assistant": "Assistant:"}


def chat_template(roles: Mapping[str, str] = ROLE_TOKENS, separator: str = "") -> str:
    """Return a Jinja chat template.

    Args:
        roles: the text before a turn, by role.
        separator: the text after a system or user turn; an assistant turn ends with EOS.
    """
    quoted = {role: repr(text) for role, text in roles.items()}
    return (
        "{% for message in messages %}"
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
    """Set our chat template on a tokenizer without one: with role tokens if its vocabulary has them, else words."""
    if getattr(tokenizer, "chat_template", None):
        return
    vocabulary = set(tokenizer.get_vocab())
    if set(ROLE_TOKENS.values()) <= vocabulary:
        tokenizer.chat_template = chat_template()
    else:
        tokenizer.chat_template = chat_template(ROLE_WORDS, separator="\n")


def is_conversation(value: Any) -> bool:
    """Whether a column's value is a list of messages rather than text or ids."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def plain_text(value: Any) -> str:
    """Return the text of a prompt or completion; of a list of messages their contents, joined."""
    return "".join(message["content"] for message in value) if is_conversation(value) else str(value)


def prompt_text(prompt: Any, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text that a model continues: messages rendered by the chat template, or the prompt itself.

    A tokenizer without a chat template gets ours.
    """
    if is_conversation(prompt):
        ensure_chat_template_(tokenizer)
        return str(tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True))
    return str(prompt)


def bos_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that the tokenizer (and TRL) puts before plain text: BOS for Llama, nothing for GPT-2."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def text_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenize plain text, with `bos_prefix` and without any token that the tokenizer would append."""
    return bos_prefix(tokenizer) + list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(prompt: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokenize a prompt given as text or messages; ids are returned as they are.

    The same prompt has the same ids in each form.

    Raises:
        UserError: an empty prompt.
    """
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], int):
        return list(prompt)
    text = prompt_text(prompt, tokenizer)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # a template writes BOS itself
    if not ids:
        raise UserError(f"an empty prompt ({prompt!r}) cannot be continued; drop it from the dataset")
    return ids if is_conversation(prompt) else bos_prefix(tokenizer) + ids


def prompt_and_completion_ids(
    prompt: Any, completion: Any, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Tokenize prompt and completion as one text and split the ids where the prompt's own ids end.

    Returns (prompt ids, completion ids with their EOS). An empty prompt is allowed: all of `completion` (text, or
    messages of any role) is then the second part.
    """
    if is_conversation(completion):
        ensure_chat_template_(tokenizer)
        text = str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        text = prompt + completion
        text += "" if text.endswith(tokenizer.eos_token) else tokenizer.eos_token
        ids = text_ids(text, tokenizer)
    alone = prompt_ids(prompt, tokenizer) if prompt else []
    # A token may span the boundary; the completion begins at the first token that differs.
    equal = (prompt_id == text_id for prompt_id, text_id in zip(alone, ids, strict=False))
    shared = next((index for index, same in enumerate(equal) if not same), len(alone))
    return ids[:shared], ids[shared:]
