"""How a conversation becomes text, in one place.

Every assistant turn ends with the EOS token, so a model that learnt from the template also learnt to stop. The
generation markers tell TRL which tokens carry loss.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
# For a vocabulary without role tokens, such as the released GPT-2's.
ROLE_WORDS = {"system": "System: ", "user": "User: ", "assistant": "Assistant:"}

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]


def chat_template(roles: Mapping[str, str] = ROLE_TOKENS, separator: str = "") -> str:
    """A Jinja chat template.

    roles: what stands before each role's turn. separator: what ends a turn that is not the assistant's.
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


def ensure_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a tokenizer that has none the house's chat template, in role tokens where its vocabulary has them."""
    if getattr(tokenizer, "chat_template", None):
        return
    known = set(tokenizer.get_vocab())
    if set(ROLE_TOKENS.values()) <= known:
        tokenizer.chat_template = chat_template()
    else:
        tokenizer.chat_template = chat_template(ROLE_WORDS, separator="\n")


def is_conversation(value: Any) -> bool:
    """Whether a column holds a list of messages rather than text or ids."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def plain_text(value: Any) -> str:
    """The plain words of a completion, whether it is text or a list of messages."""
    return "".join(message["content"] for message in value) if is_conversation(value) else str(value)


def prompt_text(prompt: Any, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text a model continues: the chat template, applied once, for messages; the text itself otherwise."""
    if is_conversation(prompt):
        ensure_chat_template(tokenizer)
        return str(tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True))
    return str(prompt)


def bos_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before plain text: BOS for Llama's and Gemma's, as TRL trains on it; nothing for GPT-2's."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def text_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of plain text, with what the tokenizer puts before it and without what it may put behind."""
    return bos_prefix(tokenizer) + list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(prompt: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a prompt given as text, as messages or as ids; the same prompt gives the same ids in each form.

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
    """(prompt ids, completion ids with their EOS), tokenized as one text and parted where the prompt's own ids end.

    An empty prompt is allowed: the whole of `completion` (text, or messages of any roles) is then the second part.
    """
    if is_conversation(completion):
        ensure_chat_template(tokenizer)
        whole = str(tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
        ids = list(tokenizer(whole, add_special_tokens=False)["input_ids"])
    else:
        whole = prompt + completion
        whole += "" if whole.endswith(tokenizer.eos_token) else tokenizer.eos_token
        ids = text_ids(whole, tokenizer)
    first = prompt_ids(prompt, tokenizer) if prompt else []
    # Letters may merge across the boundary; the completion begins where the two part.
    same = (mine == its for mine, its in zip(first, ids, strict=False))
    shared = next((index for index, equal in enumerate(same) if not equal), len(first))
    return ids[:shared], ids[shared:]
