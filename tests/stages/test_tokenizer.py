"""The tokenizer stage: every text round-trips, the tokenizer loads like GPT-2's, and training follows the arguments."""

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data import load_texts
from rlhf_recipes.data.chat import chat_template
from rlhf_recipes.data.rows import write_rows
from rlhf_recipes.stages.tokenizer import TokenizerArguments, run_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
LINES = [
    "the cat sat on the mat",
    "the dog sat on the log",
    "a cat and a dog",
    "猫坐在垫子上",
    "don't they've we'll",
] * 40
HARD_TEXTS = [
    "",
    " ",
    "\n\n\t  \r\n trailing ",
    "the cat , the dog . isn't it ? n't 's",  # what a clean-up would change
    "猫坐在垫子上。你好,世界!",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽",
    "e\u0301 \u0301\u0301 क्षि नि",  # combining marks, also with nothing to combine with
    "".join(map(chr, range(32))) + "\x7f\x80\x9f\xa0\xad",
    "\ufeff\u200b\u200d\u202e\u2028\u2029\ufffd\uffff",
    "\U0010ffff\U000e0001",
    "ﬁ ① K Å",  # letters that a normalisation would replace
    "<|endoftext|>x<|user|> <|pad|>",
    "x" * 5000,
]


def train(folder: Path, lines: list[str] = LINES, **options: Any) -> Any:
    from transformers import AutoTokenizer

    write_rows(folder / "data" / "train.jsonl", [{"text": line} for line in lines])
    arguments = {"dataset_name": str(folder / "data"), "output_dir": str(folder / "tokenizer"), "vocab_size": 300}
    return AutoTokenizer.from_pretrained(run_tokenizer(TokenizerArguments(**{**arguments, **options})))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("trained"), model_max_length=77)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_hard_texts_round_trip(trained: Any, text: str) -> None:
    assert trained.decode(ids_of(trained, text)) == text


def test_random_unicode_round_trips(trained: Any) -> None:
    """Two hundred strings over all of Unicode except surrogates, which UTF-8 cannot encode."""
    chance = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (0x4E00, 0x9FFF)]
    seen = set()
    for _ in range(200):
        text = "".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(chance.randrange(40)))
        seen |= {unicodedata.category(letter) for letter in text}
        assert trained.decode(ids_of(trained, text)) == text
    assert {"Mn", "Cc", "Cf", "Lo", "So", "Co", "Cn"} <= seen, "the strings held the hard kinds of characters"


def test_the_tokenizer_has_what_stages_expect_of_gpt2(trained: Any) -> None:
    assert type(trained).__name__.startswith("GPT2Tokenizer")
    assert trained.is_fast and len(trained) == 300 == len(set(trained.get_vocab().values()))
    assert trained.convert_ids_to_tokens(range(5)) == SPECIAL
    assert (trained.bos_token, trained.eos_token, trained.unk_token) == ("<|endoftext|>",) * 3
    assert trained.pad_token == "<|pad|>" and trained.model_max_length == 77
    assert trained.chat_template == chat_template()
    assert [ids_of(trained, token) for token in SPECIAL] == [[index] for index in range(5)]
    assert ids_of(trained, "a") == trained("a")["input_ids"], "nothing is added before or after"
    assert trained.decode(ids_of(trained, "<|user|>hi"), skip_special_tokens=True) == "hi"


def test_a_model_folder_loads_the_same_tokenizer(trained: Any, make_model: Any, tmp_path: Path) -> None:
    """Next to a GPT-2 config.json, AutoTokenizer chooses another class."""
    from transformers import AutoTokenizer

    make_model(vocab_size=300).save_pretrained(tmp_path)
    trained.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in HARD_TEXTS:
        assert ids_of(again, text) == ids_of(trained, text) and again.decode(ids_of(again, text)) == text


def test_merges_match_byte_pair_encoding_by_hand(tmp_path: Path) -> None:
    """By hand: `abab` counts ab 4 (in two words), ` c` 3; the first merge is the most frequent pair, and so on."""
    tokenizer = train(tmp_path, ["ab", "ab", "abc", "abc", "bc"], vocab_size=256 + 5 + 2)
    assert tokenizer.convert_ids_to_tokens([261, 262]) == ["ab", "abc"]
    assert [tokenizer.decode([token]) for token in ids_of(tokenizer, "abcab")] == ["abc", "ab"]


def test_min_frequency_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = train(tmp_path, ["xy"] * 3 + ["qz"] * 2, vocab_size=400, min_frequency=3, special_tokens=["<|tool|>"])
    assert len(ids_of(tokenizer, "xy")) == 1 and len(ids_of(tokenizer, "qz")) == 2
    assert ids_of(tokenizer, "<|tool|>") == [5] and "<|tool|>" in tokenizer.all_special_tokens
    assert len(tokenizer) == 256 + 6 + 1


def test_metrics_are_of_held_out_text(tmp_path: Path) -> None:
    held_out = ["the cat sat", "🙂猫"]
    write_rows(tmp_path / "data" / "test.jsonl", [{"text": text} for text in held_out])
    tokenizer = train(tmp_path)
    metrics = json.loads((tmp_path / "tokenizer" / "metrics.json").read_text(encoding="utf-8"))
    size, count = 11 + 4 + 3, sum(len(ids_of(tokenizer, text)) for text in held_out)
    assert metrics == {"vocab_size": 300, "bytes_per_token": size / count, "bytes": size, "tokens": count}


def test_streaming_gives_the_same_files(tmp_path: Path) -> None:
    for name, streaming in (("a", False), ("b", False), ("c", True)):
        train(tmp_path / name, dataset_streaming=streaming)
    first, *others = [(tmp_path / name / "tokenizer" / "tokenizer.json").read_bytes() for name in "abc"]
    assert others == [first, first]


def test_conversations_and_pairs_give_the_merges_of_their_text(tmp_path: Path) -> None:
    """Each format of the same words gives the merges of the words as plain lines."""
    turn = {"user": "who is the cat", "assistant": "the cat is a cat"}
    messages = [{"role": role, "content": words} for role, words in turn.items()]
    forms: dict[str, dict[str, Any]] = {
        "messages": {"messages": messages},
        "chat": {"prompt": messages[:1], "completion": messages[1:]},
        "pair": {"prompt": turn["user"], "completion": turn["assistant"]},
        "two": {"chosen": turn["user"], "rejected": turn["assistant"]},
    }
    wanted = train(tmp_path / "lines", list(turn.values()) * 3)
    for name, row in forms.items():
        write_rows(tmp_path / name / "train.jsonl", [row] * 3)
        options = {"dataset_name": str(tmp_path / name), "output_dir": str(tmp_path / f"{name}-out")}
        output = run_tokenizer(TokenizerArguments(vocab_size=300, **options))
        merges = json.loads((output / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
        assert merges == json.loads(wanted.backend_tokenizer.to_str())["model"]["merges"], name


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "data.jsonl", [{"text": line} for line in LINES])
    arguments = TokenizerArguments(
        dataset_name=str(tmp_path / "data.jsonl"), vocab_size=300, output_dir=str(tmp_path / "out")
    )
    monkeypatch.setenv("RANK", "1")
    assert run_tokenizer(arguments) == tmp_path / "out" and not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    assert (run_tokenizer(arguments) / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 260}, "give at least 261"),
        ({"vocab_size": 261, "special_tokens": ["<|tool|>"]}, "6 special tokens; give at least 262"),
        ({"min_frequency": 0}, "min_frequency"),
        ({"special_tokens": [" "]}, "empty token"),
        ({"text_column": "words"}, "has no column 'words' but number, text"),
        ({"text_column": "number"}, "holds 1, which is no text"),
        ({"dataset_name": None}, "--dataset_name"),
        ({"dataset_name": "runs/nowhere/at/all"}, "no such file or folder"),
        ({"output_dir": "{data}"}, "holds the input"),
        ({"output_dir": "{file}"}, "is a file"),
    ],
)
def test_invalid_input_is_one_line_and_writes_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    data = tmp_path / "data"
    write_rows(data / "train.jsonl", [{"number": 1, "text": "text"}])
    places = {"data": str(data), "file": str(data / "train.jsonl")}
    given = {key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        run_tokenizer(TokenizerArguments(**{"dataset_name": str(data), "output_dir": str(tmp_path / "out"), **given}))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "train.jsonl"]


def test_the_recipe_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, "recipes/tokenizer.py", "--dataset_name", "x.jsonl", "--vocab_sise", "300"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --vocab_sise; did you mean 'vocab_size'?\n"
    assert not (tmp_path / "out").exists()


def test_a_row_limit_counts_all_training_sources_together(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "aa"}] * 3)
    write_rows(tmp_path / "data" / "test.jsonl", [{"text": "xyz"}] * 5)
    write_rows(tmp_path / "more" / "train.jsonl", [{"text": "bb bb"}] * 3)
    arguments = TokenizerArguments(
        dataset_name=str(tmp_path / "data"), extra_dataset_names=[str(tmp_path / "more")], max_train_samples=4,
        output_dir=str(tmp_path / "out"), vocab_size=300,
    )  # fmt: skip
    assert list(load_texts(arguments)[0]) == ["aa", "aa", "aa", "bb bb"]
    run_tokenizer(arguments)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["bytes"] == 15


def test_a_row_filter_may_use_a_column_of_one_source(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": "aa"}])
    write_rows(tmp_path / "more" / "train.jsonl", [{"text": word, "source": word} for word in ("bb", "cc")])
    arguments = TokenizerArguments(
        dataset_name=str(tmp_path / "data"), extra_dataset_names=[str(tmp_path / "more")], row_filter=["source=cc"],
    )  # fmt: skip
    assert list(load_texts(arguments)[0]) == ["aa", "cc"]
