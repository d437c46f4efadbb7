"""Texts and conversations as ids, for each kind of tokenizer: how they begin, how they end, and that stages do not differ."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import ensure_chat_template_, turn_end
from rlhf_recipes.data.conversations import encode_conversation, encode_demonstration
from rlhf_recipes.data.decoding import decode_answers, decode_prompt
from rlhf_recipes.data.encoding import answer_ends, encode_completion, encode_pair, encode_text, prompt_ids, text_ids
from rlhf_recipes.data.packing import pack_documents
from rlhf_recipes.data.prompts import Prompts
from rlhf_recipes.data.special_tokens import document_start, special_tokens_around_text
from rlhf_recipes.training.classifier import encode_labelled

Template = str
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED_CHATML = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def finished(backend: Tokenizer, before: list[str], after: list[str], **tokens: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts special tokens around plain text."""
    ids = [(token, backend.token_to_id(token)) for token in (*before, *after)]
    if ids:
        single = " ".join([*before, "$A", *after])
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens)


@pytest.fixture(scope="module")
def make_kind(make_tokenizer: Callable[[], Any]) -> Callable[[str], Any]:
    """Return a function that makes a tokenizer of a kind; text is its bytes, except in the kinds of Llama-2."""

    def by_bytes(special: list[str], before: list[str] = [], after: list[str] = [], **tokens: Any) -> Any:  # noqa: B006
        from tokenizers import AddedToken

        backend = Tokenizer(models.BPE(vocab=make_tokenizer().backend_tokenizer.get_vocab(False), merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        return finished(backend, before, after, **tokens)

    def by_words(add_eos: bool, **tokens: Any) -> Any:
        letters = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/:.,!?+=0123456789"]
        vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", "\n", *letters])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        backend.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        return finished(backend, ["<s>"], ["</s>"] if add_eos else [], **named, **tokens)

    im = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    gemma = {"bos_token": "<bos>", "eos_token": "<end>", "pad_token": "<pad>"}
    glm = {"eos_token": "<|user|>", "pad_token": "<|user|>"}
    kinds: dict[str, Callable[[], Any]] = {
        "GPT-2": lambda: by_bytes(["<|endoftext|>"], **dict.fromkeys(("bos_token", "eos_token", "pad_token"), im[0])),
        "ours": make_tokenizer,
        "ChatML": lambda: by_bytes(im, eos_token=im[2], pad_token=im[0], chat_template=CHATML),
        "unmarked ChatML": lambda: by_bytes(im, eos_token=im[2], pad_token=im[0], chat_template=UNMARKED_CHATML),
        "base Qwen": lambda: by_bytes(im, eos_token=im[0], pad_token=im[0], chat_template=CHATML),
        "Llama": lambda: by_words(False, chat_template=LLAMA),
        "base Llama": lambda: by_words(False),
        "Llama with EOS": lambda: by_words(True, chat_template=LLAMA),
        "Gemma": lambda: by_bytes(["<bos>", "<turn>", "<end>", "<pad>"], ["<bos>"], chat_template=GEMMA, **gemma),
        "base Gemma": lambda: by_bytes(["<bos>", "<end>", "<pad>"], ["<bos>"], **gemma),
        "Phi": lambda: by_bytes(
            ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
            eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=PHI,
        ),
        "GLM": lambda: by_bytes(["[gMASK]", "<sop>", "<|user|>"], ["[gMASK]", "<sop>"], **glm),
    }  # fmt: skip
    return lambda kind: kinds[kind]()


KINDS = (
    "GPT-2", "ours", "ChatML", "unmarked ChatML", "base Qwen", "Llama", "base Llama", "Llama with EOS", "Gemma",
    "base Gemma", "Phi", "GLM",
)  # fmt: skip
BEFORE = {kind: ["<s>"] for kind in ("Llama", "base Llama", "Llama with EOS")}
BEFORE |= {"Gemma": ["<bos>"], "base Gemma": ["<bos>"], "GLM": ["[gMASK]", "<sop>"]}
ENDS = {
    **dict.fromkeys(("ChatML", "unmarked ChatML", "base Qwen"), "<|im_end|>"),
    **dict.fromkeys(("GPT-2", "ours"), "<|endoftext|>"),
    **dict.fromkeys(("Llama", "base Llama", "Llama with EOS"), "</s>"),
    **dict.fromkeys(("Gemma", "base Gemma"), "<end>"),
    "Phi": "<|end|>",
    "GLM": "<|user|>",
}


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PROMPT, ANSWER, OTHER = [says("user", "Who?")], [says("assistant", "I am")], [says("assistant", "No")]
LONG = [*PROMPT, *ANSWER, says("user", "And"), says("assistant", "you")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_with_its_prefix_and_ends_with_one_eos(make_kind: Any, kind: str) -> None:
    tokenizer = make_kind(kind)
    before = tokenizer.convert_tokens_to_ids(BEFORE.get(kind, []))
    after = [tokenizer.eos_token_id] if kind == "Llama with EOS" else []
    assert special_tokens_around_text(tokenizer) == (before, after)
    plain = tokenizer("Hi all", add_special_tokens=False)["input_ids"]
    assert text_ids("Hi all", tokenizer) == [*before, *plain] == prompt_ids("Hi all", tokenizer)
    assert encode_text("Hi all", tokenizer) == [*before, *plain, tokenizer.eos_token_id]
    begun = "".join(BEFORE.get(kind, [])) + "Hi"  # as a rendered template begins
    assert text_ids(begun, tokenizer)[: len(before) + 1].count(tokenizer.bos_token_id) == (
        "<" in begun and kind != "GLM"
    )
    assert encode_text("Hi" + tokenizer.eos_token, tokenizer)[-2:] == [
        text_ids("Hi", tokenizer)[-1],
        tokenizer.eos_token_id,
    ]
    assert document_start(tokenizer) == (before or [tokenizer.eos_token_id])
    packed = pack_documents(Dataset.from_dict({"text": ["Hi all", "Hi all"]}), tokenizer, 1)
    assert [row["input_ids"][0] for row in packed] == [*before, *plain, tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_has_the_same_ids_in_every_stage(make_kind: Any, kind: str) -> None:
    tokenizer = make_kind(kind)
    query = prompt_ids(PROMPT, tokenizer)
    pair = encode_pair({"prompt": PROMPT, "chosen": ANSWER, "rejected": OTHER}, tokenizer)
    answer = [*query, *pair["chosen_ids"]]
    assert pair["prompt_ids"] == query
    assert Prompts([{"prompt": PROMPT}], tokenizer, None, 1).ids == [query]
    labelled = {"prompt": PROMPT, "completion": ANSWER, "label": 1}
    assert encode_labelled(labelled, tokenizer) == {"input_ids": answer, "labels": 1}
    assert encode_labelled({"messages": [*PROMPT, *ANSWER], "label": 0}, tokenizer)["input_ids"] == answer
    shown = encode_demonstration({"prompt": PROMPT, "completion": ANSWER}, tokenizer)
    assert shown == {"input_ids": answer, "labels": [-100] * len(query) + pair["chosen_ids"]}
    assert encode_demonstration({"messages": [*PROMPT, *ANSWER]}, tokenizer) == shown
    # It begins once, and ends with the token that a policy samples last.
    before, end = tokenizer.convert_tokens_to_ids(BEFORE.get(kind, [])), tokenizer.convert_tokens_to_ids(ENDS[kind])
    assert query[: len(before)] == before and not set(before) & set(query[len(before) :])
    assert answer[-1] == end and end in answer_ends(tokenizer) and answer[len(query) :].count(end) == 1
    found = turn_end(tokenizer)
    assert found is not None and found.id == end


@pytest.mark.parametrize("kind", KINDS)
def test_each_answer_of_a_conversation_and_its_end_have_loss(make_kind: Any, kind: str) -> None:
    tokenizer = make_kind(kind)
    ids, mask = encode_conversation(LONG, tokenizer)
    end = tokenizer.convert_tokens_to_ids(ENDS[kind])
    said = [token for token, has_loss in zip(ids, mask, strict=True) if has_loss]
    first, second = (encode_completion(LONG[:turn], LONG[turn : turn + 1], tokenizer)[1] for turn in (1, 3))
    assert said == [*first, *second] and said.count(end) == 2 and ids[-1] == end
    untrained = [*PROMPT, ANSWER[0] | {"train": False}, *LONG[2:]]
    ids_again, mask = encode_conversation(untrained, tokenizer)
    assert ids_again == ids and [token for token, kept in zip(ids, mask, strict=True) if kept] == second
    _, mask = encode_conversation(untrained, tokenizer, assistant_only=False)
    assert [token for token, kept in zip(ids, mask, strict=True) if not kept] == first


@pytest.mark.parametrize("kind", KINDS)
def test_a_begun_turn_is_continued_in_every_stage(make_kind: Any, kind: str) -> None:
    """The rows are those of the whole turn: it is neither closed nor followed by another header."""
    tokenizer = make_kind(kind)
    begun, rest = [*PROMPT, says("assistant", "I")], [says("assistant", " am")]
    whole = [*prompt_ids(PROMPT, tokenizer), *encode_completion(PROMPT, ANSWER, tokenizer)[1]]
    query = prompt_ids(begun, tokenizer)
    assert whole[: len(query)] == query and query[-1] == tokenizer("I", add_special_tokens=False)["input_ids"][-1]
    pair = encode_pair({"prompt": begun, "chosen": rest, "rejected": OTHER}, tokenizer)
    assert [*pair["prompt_ids"], *pair["chosen_ids"]] == whole and pair["prompt_ids"] == query
    row = encode_demonstration({"prompt": begun, "completion": rest}, tokenizer)
    assert row["input_ids"] == whole and row["labels"] == [-100] * len(query) + whole[len(query) :]


@pytest.mark.parametrize("kind", ["GPT-2", "ours", "ChatML"])
def test_rows_are_those_of_trl(make_kind: Any, kind: str) -> None:
    """Where TRL is right: it leaves the line break behind ChatML's last turn."""
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    tokenizer = make_kind(kind)
    ensure_chat_template_(tokenizer)
    tail = [*b"\n"] if kind == "ChatML" else []
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    plain = {"prompt": "1+1=", "completion": "2", "chosen": "2", "rejected": "3 or so"}
    for row in (plain, {"prompt": PROMPT, "completion": ANSWER, "chosen": ANSWER, "rejected": OTHER}):
        cut = tail if row["prompt"] == PROMPT else []
        options: dict[str, Any] = {
            "output_dir": "out",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "max_length": None,
        }
        demonstration = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")}])
        [theirs] = SFTTrainer._prepare_dataset(
            trainer, demonstration, tokenizer, SFTConfig(**options), False, None, "train"
        )
        ours = encode_demonstration(demonstration[0], tokenizer, assistant_only=False)
        assert {name: theirs[name] for name in ours} == {name: [*ids, *cut] for name, ids in ours.items()}
        pairs = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")}])
        [theirs] = DPOTrainer._prepare_dataset(trainer, pairs, tokenizer, DPOConfig(**options), "train")
        pair = encode_pair(pairs[0], tokenizer)
        assert theirs["prompt_ids"] == pair["prompt_ids"]
        assert all(theirs[side] == [*pair[side], *cut] for side in ("chosen_ids", "rejected_ids"))
        [theirs] = RewardTrainer._prepare_dataset(trainer, pairs, tokenizer, RewardConfig(**options), "train")
        assert theirs["chosen_ids"] == [*pair["prompt_ids"], *pair["chosen_ids"], *cut]
    messages = Dataset.from_list([{"messages": LONG}])
    marked = SFTConfig(**options, assistant_only_loss=True)
    [theirs] = SFTTrainer._prepare_dataset(trainer, messages, tokenizer, marked, False, None, "train")
    ours = encode_demonstration(messages[0], tokenizer)
    assert theirs["input_ids"] == [*ours["input_ids"], *tail]
    assert theirs["labels"] == [*ours["labels"], *[-100] * len(tail)]


def test_tools_and_template_variables_reach_the_template(make_kind: Any) -> None:
    tokenizer = make_kind("ChatML")
    tokenizer.chat_template = "{{ (tools | tojson) if tools }}{{ mode }}" + CHATML
    tool = {"type": "function", "function": {"name": "weather"}}
    row = {"prompt": PROMPT, "chosen": ANSWER, "rejected": OTHER, "completion": ANSWER}
    for columns in (
        {"tools": [tool], "chat_template_kwargs": {"mode": "fast"}},
        {
            "tools": '[{"type": "function", "function": {"name": "weather"}}]',
            "chat_template_kwargs": '{"mode": "fast"}',
        },
    ):
        start = list(b'[{"type": "function", "function": {"name": "weather"}}]fast')
        given = row | columns
        rows = [
            encode_pair(given, tokenizer)["prompt_ids"],
            encode_demonstration(given, tokenizer)["input_ids"],
            encode_labelled(given | {"label": 1}, tokenizer)["input_ids"],
            encode_demonstration({"messages": [*PROMPT, *ANSWER], **columns}, tokenizer)["input_ids"],
            Prompts([given], tokenizer, None, 1).ids[0],
        ]
        assert all(ids[: len(start)] == start for ids in rows)
    with pytest.raises(UserError, match=r"go to the chat template, but .* is no JSON"):
        encode_pair(row | {"tools": "hammer"}, tokenizer)


def test_messages_that_a_template_refuses_are_one_line(make_kind: Any) -> None:
    tokenizer = make_kind("ours")
    tokenizer.chat_template = "{{ raise_exception('no\nmore') }}"
    with pytest.raises(UserError, match=r"the chat template cannot render the messages .*: no$"):
        prompt_ids(PROMPT, tokenizer)


@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "Llama with EOS", "Gemma", "GLM"])
def test_an_answer_is_decoded_behind_its_prompt(make_kind: Any, kind: str) -> None:
    tokenizer = make_kind(kind)
    texts = [("the king", " loves small"), ("the ki", "ng loves"), ("x" * 99, "."), ("a", "")]
    prompts = [text_ids(prompt, tokenizer) for prompt, _ in texts]
    answers = [
        [*text_ids(a + b, tokenizer)[len(ids) :], tokenizer.eos_token_id]
        for (a, b), ids in zip(texts, prompts, strict=True)
    ]
    assert decode_answers(prompts, answers, tokenizer) == [answer for _, answer in texts]
    assert [decode_prompt(ids, tokenizer) for ids in prompts] == [prompt for prompt, _ in texts]
    start = document_start(tokenizer)  # behind BOS alone, an answer begins a text
    ids = tokenizer("Hi all", add_special_tokens=False)["input_ids"]
    assert decode_answers([start, []], [ids, ids], tokenizer) == ["Hi all", "Hi all"]


def test_a_prompt_may_end_within_a_character(make_kind: Any) -> None:
    """The bytes of the character are decoded with the answer, which begins with the whole character."""
    tokenizer, text = make_kind("GPT-2"), "中文, é"
    ids = tokenizer(text)["input_ids"]
    for place in range(1, len(ids)):
        prompt = decode_prompt(ids[:place], tokenizer)
        [answer] = decode_answers([ids[:place]], [ids[place:]], tokenizer)
        assert prompt + answer == text and "\ufffd" not in prompt + answer
