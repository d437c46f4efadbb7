"""Rows from files, their filters and joins; the chat template; packing against a hand-joined stream of ids."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.core.arguments import DatasetArguments
from rlhf_recipes.core.errors import UserError
from rlhf_recipes.data.chat import (
    chat_template,
    ensure_chat_template_,
    is_conversation,
    plain_text,
    prompt_and_completion_ids,
    prompt_ids,
)
from rlhf_recipes.data.checks import keep_fitting_prompts, require_held_out, require_text, require_texts
from rlhf_recipes.data.packing import pack_documents
from rlhf_recipes.data.sources import (
    has_columns,
    load_split,
    load_test_split,
    load_train_and_test,
    require_columns,
    write_rows,
)

ROWS = [
    {"text": f"row {index}", "source": "even" if index % 2 == 0 else "odd", "year": index // 3} for index in range(9)
]
END = 256  # the byte tokenizer's EOS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows" / "train.jsonl", ROWS)
    write_rows(tmp_path / "rows" / "test.jsonl", [{"text": "held out", "source": "odd", "year": 0}] * 2)
    return tmp_path / "rows"


def texts(dataset: Any) -> list[str]:
    return [row["text"] for row in dataset]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet", "txt", "txt.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    import pandas

    frame = pandas.DataFrame({"text": ["eins, zwei", "三", "🙂"]})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in frame.to_dict("records"))
    contents = {
        "jsonl": lines.encode(),
        "json": json.dumps(frame.to_dict("records")).encode(),
        "csv": frame.to_csv(index=False).encode(),
        "tsv": frame.to_csv(index=False, sep="\t").encode(),
        "txt": "\n".join(frame["text"]).encode(),
        "parquet": frame.to_parquet(),
    }
    content = contents[ending.removesuffix(".gz")]
    file = tmp_path / f"train.{ending}"
    file.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    assert texts(load_split(str(file), "train")) == list(frame["text"])
    assert texts(load_split(str(tmp_path), "train", streaming=True)) == list(frame["text"])


def test_shards_and_a_data_folder_are_one_split(tmp_path: Path) -> None:
    for part in (0, 1):
        write_rows(tmp_path / "data" / f"train-0000{part}-of-00002.jsonl", ROWS[part * 5 : part * 5 + 5])
    assert texts(load_split(str(tmp_path), "train")) == [row["text"] for row in ROWS]


def test_splits_and_limits(folder: Path) -> None:
    train, test = load_train_and_test(DatasetArguments(dataset_name=str(folder), max_train_samples=4))
    assert texts(train) == [row["text"] for row in ROWS[:4]] and texts(test) == ["held out"] * 2
    (folder / "test.jsonl").unlink()
    assert load_train_and_test(DatasetArguments(dataset_name=str(folder)))[1] is None
    assert load_train_and_test(DatasetArguments(dataset_name=str(folder / "train.jsonl")))[1] is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row_filter", "kept"),
    [
        (["source=odd"], lambda row: row["source"] == "odd"),
        (["source=odd", "source=even"], lambda row: True),
        (["source=even", "year=1"], lambda row: row["source"] == "even" and row["year"] == 1),
    ],
)
def test_row_filter(folder: Path, streaming: bool, row_filter: list[str], kept: Callable[[Any], bool]) -> None:
    """One column's values are alternatives, columns add up, and a limit counts the rows that are left."""
    wanted = [row["text"] for row in ROWS if kept(row)]
    arguments = DatasetArguments(dataset_name=str(folder / "train.jsonl"), row_filter=row_filter)
    assert texts(load_train_and_test(arguments, streaming=streaming)[0]) == wanted
    arguments.max_train_samples = 2
    assert texts(load_train_and_test(arguments, streaming=streaming)[0]) == wanted[:2]


def test_the_filter_holds_for_the_held_out_rows_too(folder: Path) -> None:
    with pytest.raises(UserError, match=r"test.*no row with source in \['even'\]"):
        load_train_and_test(DatasetArguments(dataset_name=str(folder), row_filter=["source=even"]))


@pytest.mark.parametrize("streaming", [False, True])
def test_further_datasets_follow(folder: Path, tmp_path: Path, streaming: bool) -> None:
    """Shared columns stay, a filter passes over a source without the column, and held-out rows are the first one's."""
    write_rows(tmp_path / "more" / "train.jsonl", [{"label": 1, "text": "further"}])
    write_rows(tmp_path / "more" / "test.jsonl", [{"label": 1, "text": "must not be seen"}])
    arguments = DatasetArguments(
        dataset_name=str(folder), extra_dataset_names=[str(tmp_path / "more")], row_filter=["source=odd"]
    )
    train, test = load_train_and_test(arguments, streaming=streaming)
    assert list(train) == [{"text": text} for text in ("row 1", "row 3", "row 5", "row 7", "further")]
    assert texts(test) == ["held out"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_filter": ["source"]}, "column=value"),
        ({"row_filter": ["sauce=odd"]}, "row_filter names the column sauce, but the dataset has text, source, year"),
        ({"row_filter": ["source=none"]}, "no row"),
        ({"dataset_train_split": "validation"}, r"no split 'validation' \(it has test, train\)"),
        ({"max_train_samples": 0}, "at least 1"),
        ({"dataset_name": None}, "--dataset_name"),
        ({"dataset_name": "nobody/nothing"}, "HF_HUB_OFFLINE=1"),
        ({"dataset_name": "./nowhere"}, "no such file or folder"),
    ],
)
def test_wrong_sources_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_train_and_test(DatasetArguments(**{"dataset_name": str(folder), **options}))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b"", "no rows|cannot be read"),
        ("train.jsonl", b'{"text": "fine"}\n{"text": \n', "cannot be read as json"),
        ("train.jsonl.gz", b"no gzip at all", "cannot be read as json"),
        ("train.parquet", b"PAR1 broken", "cannot be read as parquet"),
        ("train.doc", b"text", "no known ending"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str, streaming: bool) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_split(str(tmp_path / name), "train", streaming=streaming)
    assert "\n" not in str(caught.value)


def test_columns_are_checked_by_name_and_type(folder: Path) -> None:
    dataset = load_split(str(folder), "train")
    assert has_columns(dataset, "text", "year") and not has_columns(dataset, "prompt")
    assert require_columns(dataset, ("prompt",), ("text", "year")) == ("text", "year")
    with pytest.raises(UserError, match=r"needs the columns prompt or messages, but has text, source, year"):
        require_columns(dataset, ("prompt",), ("messages",))
    require_text(dataset, "text")
    with pytest.raises(UserError, match="column year holds 0, which is no text"):
        require_text(dataset, "year")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("block", [1, 7, 16, 400])
def test_packing_is_the_joined_stream_cut_in_blocks(
    tmp_path: Path, tokenizer: Any, block: int, streaming: bool
) -> None:
    documents = ["ab", "", "a longer document, with 中文", "x", "🙂" * 9, None, "end"] * 4
    write_rows(tmp_path / "train.jsonl", [{"text": text, "other": 1} for text in documents])
    joined = [token for text in documents if text for token in [*text.encode(), END]]
    whole = [joined[start : start + block] for start in range(0, len(joined) - block + 1, block)]
    packed = pack_documents(load_split(str(tmp_path), "train", streaming=streaming), tokenizer, block)
    assert [row["input_ids"] for row in packed] == whole
    assert [row["input_ids"] for row in packed] == whole, "a second epoch begins anew"
    assert all(list(row) == ["input_ids"] for row in packed)


@pytest.mark.parametrize("streaming", [False, True])
def test_packing_carries_over_from_one_batch_of_documents_to_the_next(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    monkeypatch.setattr("rlhf_recipes.data.packing.DOCUMENTS_PER_BATCH", 3)
    write_rows(tmp_path / "train.jsonl", [{"text": "abcd"}] * 10)
    packed = pack_documents(load_split(str(tmp_path), "train", streaming=streaming), tokenizer, 7)
    joined = ([*b"abcd", END] * 10)[:49]
    assert [token for row in packed for token in row["input_ids"]] == joined


def test_the_chat_template_ends_each_answer_and_marks_it(make_tokenizer: Callable[[], Any]) -> None:
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
    learnt = [token for token, mask in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mask]
    assert learnt == [*b"Hello!", END]
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_a_vocabulary_without_role_tokens_is_given_words(make_tokenizer: Callable[[], Any]) -> None:
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


def test_a_prompt_is_the_same_as_text_messages_and_ids(make_tokenizer: Callable[[], Any]) -> None:
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


BOS = 260


def test_plain_text_has_the_bos_that_its_tokenizer_puts_there(
    make_tokenizer_with_bos: Callable[[], Any], tokenizer: Any
) -> None:
    """Of messages the template writes what it wants."""
    with_bos = make_tokenizer_with_bos()
    assert with_bos("Hi")["input_ids"] == [BOS, *b"Hi"]
    assert prompt_ids("Hi", with_bos) == [BOS, *b"Hi"] and prompt_ids("Hi", tokenizer) == [*b"Hi"]
    assert prompt_ids([{"role": "user", "content": "Hi"}], with_bos) == [258, *b"Hi", 261, 259]
    assert prompt_and_completion_ids("Hi", " you", with_bos) == ([BOS, *b"Hi"], [*b" you", END])
    assert prompt_and_completion_ids("", "you", with_bos) == ([], [BOS, *b"you", END])
    with pytest.raises(UserError, match="empty prompt"):
        prompt_ids("", with_bos)
    rows = [{"prompt": "12345"}]
    assert keep_fitting_prompts(rows, tokenizer, 6) == rows
    with pytest.raises(UserError, match="the prompt has 6 tokens"):
        keep_fitting_prompts(rows, with_bos, 6)


ALTERNATES = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, and a user begins') }}{% endif %}{{ message['content'] }}{% endfor %}"
)


def test_an_answer_is_rendered_after_its_prompt(make_tokenizer: Callable[[], Any]) -> None:
    """As it is trained on: a template may ask for the roles that come before."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = ALTERNATES
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


def test_a_dot_in_the_name_of_a_repo_is_no_file_ending() -> None:
    for name in ("nobody/some-2.5", "nobody/some-v0.2"):
        with pytest.raises(UserError, match="as a Hub id it cannot be fetched"):
            load_split(name, "train")
    for name in ("nobody/some.jsonl", "some.csv.gz", "../some-2.5"):
        with pytest.raises(UserError, match="no such file or folder"):
            load_split(name, "train")


def test_of_a_streamed_repo_nothing_is_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for one split of a repo without streaming is to fetch all of them."""
    import datasets

    load, asked = datasets.load_dataset, []

    def as_a_repo(name: str, config: Any, split: str, streaming: bool) -> Any:
        asked.append((split, streaming))
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            raise ValueError(f"Unknown split {split}")
        return load("json", data_files=str(file), split="train", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", as_a_repo)
    arguments = DatasetArguments(
        dataset_name="me/rows", max_train_samples=3, max_test_samples=1, row_filter=["source=odd"]
    )
    train, test = load_train_and_test(arguments, streaming=True)
    assert asked == [("train", True), ("test", True)]
    assert texts(train) == ["row 1", "row 3", "row 5"] and test["text"] == ["held out"]
    assert load_test_split(DatasetArguments(dataset_name="me/rows", dataset_test_split="none"), streaming=True) is None


def test_an_evaluation_on_rows_that_there_are_not_is_refused() -> None:
    from transformers import TrainingArguments

    asked = TrainingArguments("out", eval_strategy="epoch", use_cpu=True)
    with pytest.raises(UserError, match="eval_strategy is epoch, but the dataset has no split 'validation'"):
        require_held_out(None, asked, "validation")
    require_held_out([{}], asked, "validation")
    require_held_out(None, TrainingArguments("out", use_cpu=True), "validation")
