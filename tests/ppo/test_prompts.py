"""Tests of prompts in every format, and of reward models whose tokenizer differs from the policy's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.counts import RowCounts
from rlhf_recipes.data.prompts import Prompts

Make = Callable[..., Any]
EOS, PAD, USER, ASSISTANT, SYSTEM, END = range(256, 262)


def low_share(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(token < 128 for token in ids) / len(ids) for ids in completion_ids]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two state dicts are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Prompts.

CHAT = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Hello {row}"}] for row in range(8)]
IDS = [[SYSTEM, *b"Be kind.", END, USER, *f"Hello {row}".encode(), END, ASSISTANT] for row in range(8)]
PADDED = [[PAD] * (row % 3) + ids + [PAD] * (2 - row % 3) for row, ids in enumerate(IDS)]
MASK = [[int(token != PAD) for token in ids] for ids in PADDED]
FORMATS: dict[str, Any] = {
    "text": [{"prompt": f"<|system|>Be kind.<|end|><|user|>Hello {row}<|end|><|assistant|>"} for row in range(8)],
    "messages": [{"prompt": messages} for messages in CHAT],
    "ids": [{"input_ids": ids} for ids in IDS],
    "ids as prompt": [{"prompt": ids} for ids in IDS],
    "padded ids": [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(PADDED, MASK, strict=True)],
    "tensors": Dataset.from_list([{"input_ids": ids} for ids in IDS]).with_format("torch"),
    "arrays": Dataset.from_list([{"input_ids": ids} for ids in IDS]).with_format("numpy"),
    "stream": Dataset.from_list([{"prompt": messages} for messages in CHAT]).to_iterable_dataset(),
}


def test_all_prompt_formats_give_the_same_ids_and_weights(
    make_trainer: Make, make_policy: Make, recorder: type, weights_of: Make
) -> None:
    """The ids are those written by hand, with the chat template once; the trained weights are equal bit for bit."""
    weights = {}
    for name, rows in FORMATS.items():
        trainer = make_trainer(
            make_policy(n_layer=1), rows=rows, trainer_class=recorder, max_steps=1, num_ppo_epochs=1
        )
        trainer.train()
        assert sorted(trainer.generated[0][1]) == sorted(IDS), name
        weights[name] = weights_of(trainer.model)
    assert [name for name in FORMATS if not same(weights["text"], weights[name])] == []


def test_reward_model_reads_the_chat_template_once(
    make_trainer: Make, make_reward_model: Make, recorder: type
) -> None:
    reward_model, rows = make_reward_model(3), []
    reward_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    trainer = make_trainer(None, reward_model, rows=FORMATS["messages"], trainer_class=recorder, max_steps=1)
    trainer.train()
    _, queries, answers = trainer.generated[0]
    episodes = [[*query, *ids] for query, ids in zip(queries, answers.ids, strict=True)]
    assert sorted([token for token in row if token != PAD] for row in rows) == sorted(episodes)
    assert sorted(queries) == sorted(IDS) and all(row.count(USER) == row.count(ASSISTANT) == 1 for row in rows)


def test_extra_columns_cause_no_error(make_trainer: Make, make_reward_model: Make, recorder: type) -> None:
    """Columns may have any name and any values; a column that a row lacks is None for this row."""
    calls: list[dict[str, Any]] = []

    def record(**columns: Any) -> list[float]:
        calls.append(columns)
        return [0.0] * 8

    async def record_async(**columns: Any) -> list[float]:
        return record(**columns)

    extra = {
        "dict": {"a": [1]},
        "none": None,
        "list": [[], "x"],
        "lengths": 3,
        "labels": [1],
        "completion": "c",
        "seed": 1,
    }
    reserved = dict.fromkeys(("prompts", "completions", "prompt_ids", "completion_ids", "attention_mask", "self"), 0)
    rows = [{"prompt": f"Q{row}", **extra, **reserved, **({"some": row} if row % 2 else {})} for row in range(8)]
    trainer = make_trainer(
        None, [record, record_async, make_reward_model()], rows=rows, trainer_class=recorder, max_steps=1
    )
    trainer.train()
    _, queries, answers = trainer.generated[0]
    for call in calls:
        numbers = [int(bytes(query[1:])) for query in queries]
        assert set(call) == {"prompts", "completions", "completion_ids", *extra, "some"} and len(calls) == 2
        assert call["prompts"] == [f"Q{number}" for number in numbers] and call["completion_ids"] == answers.ids
        assert all(call[name] == [value] * 8 for name, value in extra.items())
        assert call["some"] == [number if number % 2 else None for number in numbers]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "'None'; give text, messages or token ids"),
        ({"prompt": 3}, "'3'; give text"),
        ({"prompt": []}, "an empty prompt"),
        ({"prompt": ["Hello"]}, "give text"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "an empty prompt"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "2 input_ids and an attention_mask of 1"),
    ],
    ids=["None", "number", "no ids", "list of texts", "padding only", "mask of another length"],
)
def test_invalid_prompts_are_one_line_errors(make_trainer: Make, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "Hello"} if "prompt" in row else {"input_ids": [72], "attention_mask": [1]}
    with pytest.raises(UserError, match=f"train_dataset row 3 has .*{message}") as raised:
        make_trainer(rows=[good] * 3 + [row] + [good] * 4)
    assert "\n" not in str(raised.value)


def test_long_prompts_are_dropped_or_cut_to_their_last_tokens(tokenizer: Any) -> None:
    rows = [{"prompt": "a" * size, "row": size} for size in (3, 9, 5, 7)]
    counts = RowCounts("prompts")
    kept = Prompts(rows, tokenizer, 10, 4, too_long="drop", counts=counts)
    assert kept.rows([1]) == {"prompts": ["a" * 5], "prompt_ids": [[97] * 5], "columns": {"row": [5]}}
    assert counts == {"read": 4, "too_long_dropped": 2, "used": 2} and len(kept) == 2
    cut = Prompts([{"prompt": "abcdefgh"}], tokenizer, 10, 4, too_long="cut")
    assert cut.ids == [[*b"cdefgh"]] and cut.rows([0])["prompts"] == ["abcdefgh"]
    with pytest.raises(UserError, match=r"row 1 has a prompt of 9 tokens.*--too_long drop"):
        Prompts(rows, tokenizer, 10, 4)
    with pytest.raises(UserError, match="all 1 rows are longer than 6 tokens"):
        Prompts(rows[1:2], tokenizer, 10, 4, too_long="drop")


# Reward models with another tokenizer.


@pytest.fixture(scope="module")
def other_tokenizer(make_tokenizer: Make) -> Any:
    """Return a tokenizer in which byte b has the id 299 - b.

    Its template writes a turn as its role's first letter, `=`, the text, EOS for the assistant, and a line break.
    """
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: 299 - number for token, number in state["model"]["vocab"].items()}
    state["added_tokens"] = [{**state["added_tokens"][0], "id": 0, "content": "</s>"}]
    state["model"]["vocab"]["</s>"] = 0
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", pad_token="</s>"
    )
    turns = "{% for m in messages %}{{ m['role'][0] }}={{ m['content'] }}"
    tokenizer.chat_template = turns + "{{ eos_token if m['role'] == 'assistant' }}\n{% endfor %}"
    return tokenizer


def score_by_hand(reward_model: Any, text: str) -> float:
    """Score a text in the other tokenizer's ids, in float64 from the states of the reward model's trunk."""
    parts = [[299 - byte for byte in part.encode()] for part in text.split("</s>")]
    ids = [number for part in parts for number in [*part, 0]][:-1]
    with torch.no_grad():
        state = reward_model.transformer(torch.tensor([ids])).last_hidden_state[0, -1].double()
    return (reward_model.score.weight[0].detach().double() @ state).item()


@pytest.mark.parametrize("prompts", ["messages", "text"])
@pytest.mark.parametrize("source", ["model", "folder"])
def test_reward_model_reads_text_with_its_tokenizer_and_template(
    make_trainer: Make, make_policy: Make, make_reward_model: Make, recorder: type, other_tokenizer: Any, tmp_path: Path,
    prompts: str, source: str,
) -> None:  # fmt: skip
    """Turns are written in its template, with its EOS only if the policy has ended its answer, and nothing after it."""
    model, reward_model = make_policy(), make_reward_model(3, vocab_size=300, initializer_range=0.2, pad_token_id=1)
    model.lm_head.weight.data[EOS] *= 40
    options: dict[str, Any] = {"reward_processing_classes": [None, other_tokenizer]}
    if source == "folder":
        reward_model.save_pretrained(tmp_path / "reward_model")
        other_tokenizer.save_pretrained(tmp_path / "reward_model")
        options = {}
    rows = [
        {"prompt": [{"role": "user", "content": f"Hé {row}"}] if prompts == "messages" else f"Hé {row}: "}
        for row in range(16)
    ]
    reward = reward_model if source == "model" else str(tmp_path / "reward_model")
    trainer = make_trainer(
        model,
        [low_share, reward],
        rows=rows,
        trainer_class=recorder,
        per_device_train_batch_size=16,
        stop_token="eos",
        **options,
    )
    trainer.train()
    (scored,), (_, queries, answers) = trainer.scored, trainer.generated[0]
    assert list(scored) == ["low_share", "reward_model"] and set(answers.stopped) == {True, False}
    for query, ids, ended, score in zip(queries, answers.ids, answers.stopped, scored["reward_model"], strict=True):
        prompt, answer = (
            bytes(token for token in part if token < 256).decode(errors="replace") for part in (query, ids)
        )
        text = f"u={prompt}\na={answer}" if prompts == "messages" else prompt + answer
        assert score == pytest.approx(score_by_hand(reward_model, text + "</s>" * ended), abs=1e-4)
    assert np.std(scored["reward_model"]) > 0.05


def test_undeclared_vocabulary_mismatch_is_refused(
    make_trainer: Make, make_reward_model: Make, recorder: type, tokenizer: Any, tmp_path: Path
) -> None:
    """The error comes before any file is written. A declared tokenizer is used without this check."""
    reward_model = make_reward_model(3, vocab_size=300)
    with pytest.raises(
        UserError, match=r"300 token embeddings and the policy 262.*reward_processing_classes"
    ) as raised:
        make_trainer(None, [low_share, reward_model])
    assert "\n" not in str(raised.value) and not any(path.is_file() for path in tmp_path.rglob("*"))
    trainer = make_trainer(
        None, reward_model, reward_processing_classes=tokenizer, trainer_class=recorder, max_steps=1
    )
    trainer.train()
    (scores,), (_, queries, answers) = trainer.scored[0].values(), trainer.generated[0]
    for query, ids, score in zip(queries, answers.ids, scores, strict=True):
        with torch.no_grad():
            assert score == pytest.approx(reward_model(torch.tensor([[*query, *ids]])).logits.item(), abs=1e-5)


def test_pad_token_beyond_the_embedding_changes_nothing(
    make_trainer: Make,
    make_policy: Make,
    make_reward_model: Make,
    make_tokenizer: Make,
    recorder: type,
    weights_of: Make,
) -> None:
    """`[PAD]` is added without a new embedding row; in the last run it is the reward model's pad_token_id, too."""
    extended = make_tokenizer()
    extended.add_special_tokens({"pad_token": "[PAD]"})
    assert extended.pad_token_id == 262 == make_policy().config.vocab_size
    runs = []
    for tokenizer, pad in ((make_tokenizer(), PAD), (extended, PAD), (extended, 262)):
        reward_model = make_reward_model(3, initializer_range=0.2, pad_token_id=pad)
        trainer = make_trainer(
            None, reward_model, trainer_class=recorder, processing_class=tokenizer, num_ppo_epochs=1
        )
        trainer.train()
        runs.append(
            (weights_of(trainer.model), [score for scores in trainer.scored for score in scores["reward_model"]])
        )
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert runs[2][1] == pytest.approx(runs[0][1], abs=1e-5)
